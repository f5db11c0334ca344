"""Do Diffusers and PEFT open what we write at full size, and compute what we compute?

Writes a random transformer of the real 5B size in the official layout and a random LoRA (B is not
zero, alpha is not the rank), converts both with the commands that a user runs, and compares
velocities in float32 on this GPU: ours, and those of Diffusers, which opens the exported folders
and each LoRA file. Needs torch, diffusers and peft beside the package, and 50 GB of disk.

    python benchmarks/open_exports.py --work /tmp/exports
    python benchmarks/open_exports.py --work /tmp/exports --tiny   # does it run, on a CPU
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
DIALECTS = ("comfyui", "diffusers", "kohya")
RANK, ALPHA = 32, 24.0
SHAPE = (1, 3, 16, 16, 48)  # of the latents
TOLERANCE = 1e-4  # of the largest number
ROUNDED = 1e-2  # where weights of a merged model were rounded to bfloat16
COMMANDS = {"wan22-convert": "convert.weights", "wan22-lora": "convert.lora_tools"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="made anew, left when it fails")
    parser.add_argument("--skip_merged", action="store_true", help="only LoRAs on the base")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check the program")
    parser.add_argument("--part", choices=("make", "ours", "theirs"), help="run by the program")
    args = parser.parse_args()
    args.work = args.work.absolute()
    if args.part:
        {"make": make, "ours": compute_ours, "theirs": compare_theirs}[args.part](args)
        return
    args.work.mkdir(parents=True)
    tiny = ["--tiny"] * args.tiny
    part = [sys.executable, __file__, "--work", str(args.work), *tiny, "--part"]
    run("make", [*part, "make"], args.work)
    command(args.work, "wan22-convert", "--ckpt_path", "source", "--out", "model")
    shutil.rmtree(args.work / "source")
    for dialect in DIALECTS[1:]:
        lora = ("--lora", "comfyui.safetensors", "--format", dialect)
        command(args.work, "wan22-lora", "convert", *lora, "--out", f"{dialect}.safetensors")
    ours = subprocess.Popen([*part, "ours"], cwd=args.work, env=environment())  # beside the next
    exported = (("base", 0), ("merged", 1))[: 1 if args.skip_merged else 2]
    for name, strength in exported:
        lora = ("--lora", f"comfyui.safetensors:{strength}", "--model", "model")
        out = ("--format", "diffusers", "--out", name)
        command(args.work, "wan22-lora", "merge", *lora, *out)
    if ours.wait():
        sys.exit(1)
    run("theirs", [*part, "theirs"], args.work)
    shutil.rmtree(args.work)


def command(folder: Path, name: str, *words: str) -> None:
    """Runs a command of the package."""
    program = f"import sys; from {COMMANDS[name]} import main; sys.exit(main())"
    run(" ".join((name, *words)), [sys.executable, "-c", program, *words], folder)


def run(what: str, words: list[str], folder: Path) -> None:
    """Runs a process, prints what it said last and how long it took; ends where it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    said = [line for line in done.stdout.replace("\r", "\n").splitlines() if line.strip()]
    results = [line for line in said if line.startswith("RESULT")]
    shown = "\n".join(said[-40:] if done.returncode else results or said[-1:])
    print(f"{what} ({time.perf_counter() - start:.0f} s):\n{shown}", flush=True)
    if done.returncode:
        sys.exit(1)


def environment() -> dict[str, str]:
    """Of a process of the package."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def make(args: argparse.Namespace) -> None:
    """Writes the official folder and the LoRA."""
    sys.path.insert(0, str(ROOT))
    from flax import nnx

    from wan22_jax.adapter import Adapter
    from wan22_jax.adapter_file import write_adapter
    from wan22_jax.adapter_join import describe
    from wan22_jax.demo_checkpoint import TINY_TRANSFORMER, write_checkpoint
    from wan22_jax.model.transformer import TI2V_5B, WanTransformer
    from wan22_jax.model.umt5 import UMT5Config

    config = TINY_TRANSFORMER if args.tiny else TI2V_5B
    encoder = UMT5Config(256, dim=config.text_dim, ffn_dim=64, num_heads=4, num_layers=1)
    write_checkpoint(
        args.work / "source", captions=["a cat"], transformer=config, text_encoder=encoder
    )
    rng = np.random.default_rng(1)
    matrices, alphas = {}, {}
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    for name, layer in model.lora_targets():
        layers, num_out, num_in = layer.weight.shape
        for side, shape in (("lora_A", (RANK, num_in)), ("lora_B", (num_out, RANK))):
            drawn = rng.standard_normal((layers, *shape), np.float32) * shape[-1] ** -0.5
            matrices[f"{name}.{side}"] = drawn / 2
        alphas[name.removeprefix("blocks.")] = ALPHA
    adapter = describe(Adapter(matrices, alphas, {}, source="random"))
    write_adapter(adapter, args.work / "comfyui.safetensors")
    latents = rng.standard_normal(SHAPE, np.float32)
    text = rng.standard_normal((1, config.text_len, config.text_dim), np.float32)
    np.savez(args.work / "inputs.npz", latents=latents, text=text)


def compute_ours(args: argparse.Namespace) -> None:
    """Computes the velocity with and without the LoRA."""
    import jax

    from wan22_jax.adapter import attach_adapter, load_adapter
    from wan22_jax.model_folder import load_transformer

    jax.config.update("jax_default_matmul_precision", "highest")
    inputs = np.load(args.work / "inputs.npz")
    model = load_transformer(args.work / "model", dtype="float32")
    sigma = np.full(SHAPE[:2], 0.4, np.float32)
    velocities = {"base": model(inputs["latents"], sigma, inputs["text"])}
    attach_adapter(model, load_adapter(args.work / "comfyui.safetensors"))
    velocities["lora"] = model(inputs["latents"], sigma, inputs["text"])
    np.savez(args.work / "ours.npz", **{name: np.asarray(v) for name, v in velocities.items()})
    change = np.linalg.norm(velocities["lora"] - velocities["base"])
    change /= np.linalg.norm(velocities["base"])
    print("RESULT " + json.dumps({"the LoRA changes the velocity by": round(float(change), 4)}))


def compare_theirs(args: argparse.Namespace) -> None:
    """Opens what was exported with Diffusers and compares its velocities with ours."""
    import diffusers
    import torch

    torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, ours = np.load(args.work / "inputs.npz"), np.load(args.work / "ours.npz")
    latents = torch.from_numpy(inputs["latents"].transpose(0, 4, 1, 2, 3).copy()).to(device)
    text = torch.from_numpy(inputs["text"]).to(device)

    def open_folder(name: str) -> diffusers.WanTransformer3DModel:
        model = diffusers.WanTransformer3DModel.from_pretrained(
            args.work / name, subfolder="transformer", torch_dtype=torch.float32
        )
        return model.eval().to(device)

    def check(
        what: str,
        model: diffusers.WanTransformer3DModel,
        wanted: np.ndarray,
        tolerance: float = TOLERANCE,
    ) -> None:
        with torch.no_grad():
            velocity = model(latents, torch.tensor([400.0], device=device), text).sample
        found = velocity.cpu().numpy().transpose(0, 2, 3, 4, 1)
        error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        print("RESULT " + json.dumps({"opened": what, "error": float(f"{error:.2g}")}), flush=True)
        if not error < tolerance:
            sys.exit(f"{what}: its velocity differs by {error:.2g} of the largest number")

    if (args.work / "merged").is_dir():
        check("merged, a Diffusers folder", open_folder("merged"), ours["lora"], ROUNDED)
    model = open_folder("base")
    check("base, a Diffusers folder", model, ours["base"])
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    for dialect in DIALECTS:
        pipeline.load_lora_weights(str(args.work / f"{dialect}.safetensors"))
        check(f"base with {dialect}.safetensors", model, ours["lora"])
        pipeline.unload_lora_weights()
    check("base once more", model, ours["base"])


if __name__ == "__main__":
    main()
