"""Where do previews lie in a run's folder, and which of them are there?

``samples/step00000500/00.mp4`` is the first prompt's video after 500 steps; what it was made from
is in its metadata. Other pictures and clips may lie among them.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from wan22_jax.data.video_file import read_metadata
from wan22_jax.errors import BadInput
from wan22_jax.processes import is_main

SAMPLES = "samples"
_STEP = re.compile(r"step\d{8,}")


class PreviewFile(NamedTuple):
    """One video that is there."""

    step: int  # steps done
    path: Path
    asked: dict[str, Any]  # the settings that it was made with


def make_step_folder(run_dir: Path, step: int) -> Path:
    """Makes the folder of a step's videos; of several processes the first does."""
    folder = run_dir / SAMPLES / f"step{step:08}"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def list_preview_files(run_dir: Path) -> list[PreviewFile]:
    """Lists the videos by step and number; files of others, or damaged ones, are left out."""
    found = []
    for path in (run_dir / SAMPLES).glob("step*/*.mp4"):
        if not _STEP.fullmatch(path.parent.name):
            continue
        try:
            asked = read_metadata(path) or {}
        except BadInput:
            continue
        if isinstance(step := asked.pop("step", None), int) and "prompt" in asked:
            found.append(PreviewFile(step, path, asked))
    return sorted(found, key=lambda preview: (preview.step, preview.path))
