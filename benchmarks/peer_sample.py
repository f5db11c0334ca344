"""How long do a guided denoising step and the VAE's decoding take in PyTorch?

Diffusers' WanTransformer3DModel and AutoencoderKLWan of the Wan2.2 5B sizes with random weights in
bfloat16; a guided step is two calls, as in its pipeline, with a noise level for each token. Prints
one line of JSON as sample.py does. Needs torch and diffusers.

    python benchmarks/peer_sample.py step --compile
    python benchmarks/peer_sample.py decode
    python benchmarks/peer_sample.py step --tiny --bucket 64x64x5   # on a CPU
"""

import argparse
import json
import statistics
from collections.abc import Callable

import diffusers
import torch
from peer_encode import TINY_VAE, VAE, Z_DIM, make_vae, measure

NUM_TEXT = 512
SIZES = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "text_dim": 4096}
TINY_SIZES = {"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2, "text_dim": 32}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("step", "decode"))
    parser.add_argument("--bucket", default="1280x704x121", help="width x height x frames")
    parser.add_argument("--compile", action="store_true", help="each block with torch.compile")
    parser.add_argument("--attention", default="_native_cudnn", help="Diffusers' name of a backend")
    parser.add_argument("--repeats", type=int, default=5, help="timed, after a first one")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check the program")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        run = make_step(args) if args.part == "step" else make_decoding(args)
        first_s = measure(run)
        measure(run)
        seconds = [measure(run) for _ in range(args.repeats)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    result = {
        "program": "torch",
        "part": args.part,
        "bucket": args.bucket,
        "dtype": "bfloat16",
        "compile": args.compile,
        "s": round(statistics.median(seconds), 4),
        "s_all": [round(value, 4) for value in seconds],
        "first_s": round(first_s, 1),
        "peak_gb": round(peak / 1e9, 2),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    print("RESULT " + json.dumps(result), flush=True)


def make_step(args: argparse.Namespace) -> Callable[[], object]:
    sizes = TINY_SIZES if args.tiny else SIZES
    torch.set_default_dtype(torch.bfloat16)
    model = diffusers.WanTransformer3DModel(
        **sizes,
        patch_size=(1, 2, 2),
        attention_head_dim=128,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        freq_dim=256,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=1024,
    ).eval()
    torch.set_default_dtype(torch.float32)
    if not args.tiny:
        model.set_attention_backend(args.attention)
    if args.compile:
        model.compile_repeated_blocks(fullgraph=False)
    latents = torch.randn(1, Z_DIM, *latent_size(args.bucket), dtype=torch.bfloat16)
    prompts = torch.randn(2, 1, NUM_TEXT, sizes["text_dim"], dtype=torch.bfloat16)
    num_tokens = latents[0, 0].numel() // 4
    timestep = torch.full((1, num_tokens), 500.0)

    def predict(prompt: torch.Tensor) -> torch.Tensor:
        return model(latents, timestep, prompt, return_dict=False)[0]

    def run() -> torch.Tensor:
        towards, away = predict(prompts[0]), predict(prompts[1])
        return away + 5 * (towards - away)

    return run


def make_decoding(args: argparse.Namespace) -> Callable[[], object]:
    vae = make_vae(TINY_VAE if args.tiny else VAE, torch.bfloat16)
    if args.compile:
        vae.decoder = torch.compile(vae.decoder)
    latents = torch.randn(1, Z_DIM, *latent_size(args.bucket), dtype=torch.bfloat16)
    return lambda: (vae.decode(latents).sample.clamp(-1, 1) * 127.5 + 127.5).byte().cpu()


def latent_size(bucket: str) -> tuple[int, int, int]:
    width, height, frames = map(int, bucket.split("x"))
    return (frames - 1) // 4 + 1, height // 16, width // 16


if __name__ == "__main__":
    main()
