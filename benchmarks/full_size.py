"""Does the whole path hold at full size on this GPU, and what does each stage take?

Writes a random model of the real 5B size in the official layout (34 GB) and two clips, then runs
the commands that a user runs: convert, cache, train at 1280x704x121 and 512x512x33, export, sample.
Prints one line of JSON a stage: seconds, peak host memory, and what the stage said last.

    python benchmarks/full_size.py --checkpoint /dev/shm/checkpoint --work work
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUCKETS = ((1280, 704, 121), (512, 512, 33))
ENTRY_POINTS = {
    "wan22-convert": "convert.weights",
    "wan22-cache": "wan22_jax.encode",
    "wan22-train": "wan22_jax.train",
    "wan22-export": "convert.export",
    "wan22-sample": "wan22_jax.sample",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="needs 35 GB")
    parser.add_argument("--work", type=Path, required=True, help="needs 30 GB")
    parser.add_argument("--steps", type=int, default=5, help="train steps at each size")
    parser.add_argument("--sample_steps", type=int, default=4)
    args = parser.parse_args()
    args.checkpoint, args.work = args.checkpoint.absolute(), args.work.absolute()
    args.work.mkdir(parents=True)
    stage("make checkpoint", [sys.executable, __file__, "--make", str(args.checkpoint)], ROOT)
    stage("make clips", [sys.executable, __file__, "--make_clips", "."], args.work)

    def command(what: str, *words: str) -> None:
        module = ENTRY_POINTS[words[0]]
        program = f"import sys; from {module} import main; sys.exit(main())"
        stage(what, [sys.executable, "-c", program, *words[1:]], args.work)

    command("convert", "wan22-convert", "--ckpt_path", str(args.checkpoint), "--out", "model")
    command("cache", "wan22-cache", "--config", "train.toml", "dataset=both.toml")
    for width, height, frames in BUCKETS:
        command(
            *(f"train {width}x{height}x{frames}", "wan22-train", "--config", "train.toml"),
            *(f"dataset={width}x{height}x{frames}.toml", f"output_dir=run_{width}"),
            f"max_steps={args.steps}",
        )
    (run,) = (args.work / f"run_{BUCKETS[0][0]}").iterdir()
    command("export", "wan22-export", "--checkpoint", str(run), "--out", "lora.safetensors")
    sample = (
        *("wan22-sample", "--model", "model", "--lora", "lora.safetensors", "--prompt", "a circle"),
        *("--steps", str(args.sample_steps), "--seed", "0"),
    )
    command("sample text-to-video 1280x704x121", *sample, "--out", "t2v.mp4")
    picture = ("--image", "first.png")
    command("sample image-to-video 1280x704x121", *sample, *picture, "--out", "i2v.mp4")


def stage(what: str, words: list[str], folder: Path) -> None:
    """Runs a stage in a process of its own and reports it; stops at the first that fails."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    log = folder / f"{what.replace(' ', '_')}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    lines = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
    report = {
        "stage": what,
        "exit": os.waitstatus_to_exitcode(status),
        "seconds": round(time.perf_counter() - started, 1),
        "host_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "said": lines[-12:] if status else lines[-5:],
    }
    print(json.dumps(report), flush=True)
    if status:
        sys.exit(1)


def make_checkpoint(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from wan22_jax.demo_checkpoint import write_checkpoint
    from wan22_jax.model.transformer import TI2V_5B
    from wan22_jax.model.umt5 import UMT5_XXL
    from wan22_jax.model.vae import WAN22_VAE

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    write_checkpoint(
        folder,
        captions=["a circle moves", "a square rests"],
        transformer=TI2V_5B,
        vae=WAN22_VAE,
        text_encoder=UMT5_XXL,
    )


def make_clips() -> None:
    import numpy as np
    from PIL import Image

    from wan22_jax.data.video_file import write_video

    listing = ""
    for width, height, frames in BUCKETS:
        folder = Path(str(width))
        folder.mkdir()
        drawn = []
        for index in range(frames):
            rows, columns = np.mgrid[:height, :width]
            inside = (rows - height / 2) ** 2 + (columns - 4 * index - 200) ** 2 < 100**2
            drawn.append(np.where(inside[..., None], [220, 50, 50], [200, 200, 200]).astype("u1"))
        write_video(
            folder / "clip.mp4", iter([np.stack(drawn)]), width_px=width, height_px=height, fps=24
        )
        (folder / "clip.txt").write_text("a circle moves\n")
        if frames == BUCKETS[0][2]:
            Image.fromarray(drawn[0]).save("first.png")
        directory = (
            f"[[directory]]\npath = '{width}'\nsize_buckets = [[{width}, {height}, {frames}]]\n"
        )
        Path(f"{width}x{height}x{frames}.toml").write_text(directory)
        listing += directory
    Path("both.toml").write_text(listing)
    config = (ROOT / "configs" / "wan2.2_5b_lora.toml").read_text()
    Path("train.toml").write_text(config.replace("models/wan2.2_5b", "model"))


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make_checkpoint(Path(sys.argv[2]))
    elif sys.argv[1] == "--make_clips":
        make_clips()
    else:
        main()
