"""How do previews lie in a run's folder?

::

    samples/step00000500/prompts.json   what its videos were asked to be, by number
    samples/step00000500/00.mp4         the first of them
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

SAMPLES = "samples"  # other pictures and clips may lie there too
_PROMPTS = "prompts.json"
_STEP = re.compile(r"step(\d{8,})")


class PreviewFile(NamedTuple):
    """One video that is there."""

    step: int  # steps done
    number: int
    asked: dict[str, Any]  # the fields of its ``prompts.Request``
    path: Path


def make_step_folder(run_dir: Path, step: int, asked: list[dict[str, Any]]) -> Path:
    """Makes the folder of a step's videos and says in it what they are asked to be."""
    folder = run_dir / SAMPLES / f"step{step:08}"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{_PROMPTS}.partial"
    try:
        partial.write_text(json.dumps(asked, indent=2, ensure_ascii=False) + "\n", "utf-8")
        partial.replace(folder / _PROMPTS)
    finally:
        partial.unlink(missing_ok=True)
    return folder


def name_video(number: int) -> str:
    """Names a video within its step's folder, and its curve in TensorBoard but for the suffix."""
    return f"{number:02}.mp4"


def list_preview_files(run_dir: Path) -> list[PreviewFile]:
    """Lists the videos by step and number; folders that say nothing of theirs are left out."""
    found = []
    for folder in sorted((run_dir / SAMPLES).glob("step*")):
        step = _STEP.fullmatch(folder.name)
        if step is None or not (folder / _PROMPTS).is_file():
            continue
        try:
            asked = json.loads((folder / _PROMPTS).read_text("utf-8"))
        except ValueError:  # somebody's own file
            continue
        for number, one in enumerate(asked):
            if (path := folder / name_video(number)).is_file():
                found.append(PreviewFile(int(step[1]), number, one, path))
    return sorted(found)
