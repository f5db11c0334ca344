"""wan22-demo: does the whole path work here? It makes a tiny model and clips, and runs it all.

The model's weights are random, so its videos are noise; what shows is that each step accepts what
the one before it made. The commands are printed as they run, and work again from the same folder.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import av
from PIL import Image, ImageDraw

from wan22_jax.demo_checkpoint import write_checkpoint
from wan22_jax.demo_clips import list_scenes, write_clips
from wan22_jax.errors import BadInput, run_command
from wan22_jax.outputs import check_folder

CONFIGS = Path(__file__).parents[1] / "configs" / "tiny"
PROMPT = "A red circle moves right on a grey background."
PICTURE = Path("clips", "red_circle_still.png")
TRAIN = ("wan22-train", "--config", "lora.toml")
SAMPLE = (
    *("wan22-sample", "--model", "model", "--lora", "lora.safetensors", "--prompt", PROMPT),
    *("--width", "96", "--height", "96", "--frames", "17", "--steps", "6", "--seed", "0"),
)
_MARK = ".wan22_demo"  # a folder with this file is ours to replace
# JAX keeps compiled programs here, so resuming and the second video do not compile again.
_CACHE_VARIABLE, _COMPILED = "JAX_COMPILATION_CACHE_DIR", "compiled"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="wan22-demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to make")
    args = parser.parse_args(argv)
    return run_command(lambda: make_demo(args.out))


def make_demo(out: Path) -> None:
    """Goes from nothing to sampled videos in a folder, which an earlier demo may have made.

    Raises:
        BadInput: the folder holds something else, or a command fails.
    """
    _prepare(out)
    _say(f"$ cd {shlex.quote(str(out))}; export {_CACHE_VARIABLE}=$PWD/{_COMPILED}")
    run(out, "wan22-convert", "--ckpt_path", "checkpoint", "--out", "model")
    run(out, "wan22-cache", "--config", "lora.toml")
    run(out, *TRAIN, "max_steps=60")
    run(out, *TRAIN, "--resume_from_checkpoint")
    run_dir = max((out / "runs").iterdir()).relative_to(out)
    run(
        *(out, "wan22-export", "--checkpoint", str(run_dir), "--model", "model"),
        *("--out", "lora.safetensors"),
    )
    run(out, *SAMPLE, "--out", "text_to_video.mp4")
    run(out, *SAMPLE, "--image", str(PICTURE), "--out", "image_to_video.mp4")
    write_contact_sheet(
        out / "contact_sheet.png",
        [out / "clips" / "red_circle.mp4", out / "text_to_video.mp4", out / "image_to_video.mp4"],
    )
    _list_results(out, run_dir)


def run(folder: Path, *command: str) -> None:
    """Prints a command and runs it in the folder, as a user would.

    Raises:
        BadInput: it is not installed, or ends with another code than 0.
    """
    _say(f"$ {shlex.join(command)}")
    script = Path(sysconfig.get_path("scripts"), command[0])
    if not script.is_file():
        raise BadInput(f"{script}: is not installed; run pip install -e . in the project's folder")
    environment = os.environ | {_CACHE_VARIABLE: str(folder.resolve() / _COMPILED)}
    done = subprocess.run([str(script), *command[1:]], cwd=folder, env=environment, check=False)
    if done.returncode:
        raise BadInput(
            f"{shlex.join(command)}: failed with exit code {done.returncode}; see its message above"
        )


def write_contact_sheet(path: Path, videos: Sequence[Path], *, columns: int = 6) -> None:
    """Pastes thumbnails of evenly spaced frames into one picture, a row a video."""
    side, label = 96, 14
    sheet = Image.new("RGB", (columns * side, len(videos) * (side + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, video in enumerate(videos):
        top = row * (side + label)
        draw.text((2, top + 1), video.name, fill="black")
        with av.open(str(video)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        for column in range(columns):
            frame = frames[column * (len(frames) - 1) // (columns - 1)]
            frame.thumbnail((side, side))
            sheet.paste(frame, (column * side, top + label))
    sheet.save(path)


def _prepare(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise BadInput(f"{out}: is not empty and no earlier demo; choose another --out")
        shutil.rmtree(out)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    write_checkpoint(out / "checkpoint", captions=[scene.caption for scene in list_scenes()])
    write_clips(out / "clips")
    for config in sorted(CONFIGS.glob("*.toml")):
        shutil.copy(config, out)


def _list_results(out: Path, run_dir: Path) -> None:
    results = {
        "checkpoint": "random weights in the official layout",
        "clips": "12 clips and 2 stills with captions, and their cache",
        "lora.toml": "the config, with dataset.toml",
        "model": "the converted model",
        str(run_dir): "the training run: checkpoints, TensorBoard logs, configs",
        "lora.safetensors": "the LoRA, with ComfyUI's names",
        "text_to_video.mp4": "sampled from a prompt",
        "image_to_video.mp4": f"sampled from {PICTURE} and a prompt",
        "contact_sheet.png": "frames of a clip and of both videos",
    }
    lines = [
        f"  {out / name!s:<36} {_count_bytes(out / name) / 1e3:8,.0f} kB  {what}\n"
        for name, what in results.items()
    ]
    _say("Everything works. What was made (the weights are random, so the videos are noise):")
    sys.stdout.writelines(lines)


def _count_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _say(line: str) -> None:
    sys.stdout.write(f"\n{line}\n")
    sys.stdout.flush()  # the commands write to the same terminal


if __name__ == "__main__":
    sys.exit(main())
