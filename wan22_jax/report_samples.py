"""How do the videos and pictures of a run look in its report?

Previews stand side by side over the steps, a row a prompt, as small animations inside of the page;
whatever else lies among the samples follows as pictures.
"""

import base64
import html
import json
from pathlib import Path

from wan22_jax.data.animation import encode_animation, shrink_frames
from wan22_jax.data.thumbnail import make_thumbnail
from wan22_jax.data.video import IMAGE_SUFFIXES, probe, read_clip
from wan22_jax.errors import BadInput
from wan22_jax.geometry import FPS, Bucket
from wan22_jax.preview_files import SAMPLES, PreviewFile, list_preview_files

SAMPLE_PX = 480
MAX_SAMPLES = 200  # the newest by name
ANIMATION_PX = 224
MAX_ANIMATIONS = 64  # some 50 kB each
MAX_STEPS = 6  # of a prompt: the first, and the newest
_MAX_FRAMES = 41  # of an animation: 121 are shown at 8 fps
STYLE = """
.strip { display: flex; gap: .8rem; overflow-x: auto; }
.strip figure { margin: 0 0 .6rem; flex: 1 0 11rem; max-width: 14rem; font-size: .85em; }
.strip img { display: block; width: 100%; border-radius: .4rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1rem 0 .1rem; overflow-wrap: anywhere; }
h3 + p { margin: 0 0 .4rem; font-size: .85em; opacity: .75; overflow-wrap: anywhere; }
.samples { display: grid; gap: .8rem; }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
.samples img { display: block; width: 100%; border-radius: .4rem; }
.samples div { font-size: .85em; overflow-wrap: anywhere; }
"""


def write_samples(run_dir: Path, out: Path) -> str:
    """Writes the section of a page; "" if there is nothing to show.

    Args:
        run_dir: the run's folder.
        out: the page; clips beneath its folder are linked.
    """
    previews = list_preview_files(run_dir)
    shown = _write_previews(previews, out)
    shown += _write_others(run_dir, out, {preview.path for preview in previews})
    return f"<h2>Samples</h2>\n{shown}" if shown else ""


def _write_previews(previews: list[PreviewFile], out: Path) -> str:
    rows: dict[str, list[PreviewFile]] = {}
    for preview in previews:
        rows.setdefault(json.dumps(preview.asked, sort_keys=True), []).append(preview)
    if not rows:
        return ""
    num_steps = max(2, min(MAX_STEPS, MAX_ANIMATIONS // len(rows)))
    return "".join(_write_row(_choose(row, num_steps), out) for row in rows.values())


def _choose(row: list[PreviewFile], num_steps: int) -> list[PreviewFile]:
    return row if len(row) <= num_steps else [row[0], *row[1 - num_steps :]]


def _write_row(row: list[PreviewFile], out: Path) -> str:
    asked = dict(row[0].asked)
    prompt = html.escape(str(asked.pop("prompt")))
    figures = []
    for preview in row:
        caption = f"step {preview.step:,}"
        if picture := _animate(preview.path):
            image = _link(f'<img alt="{caption}" src="{picture}">', preview.path, out)
            figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n")
    settings = ", ".join(
        f"{name} {value}" for name, value in asked.items() if value not in ("", None)
    )
    return (
        f"<h3>{prompt}</h3>\n<p>{html.escape(settings)}</p>\n"
        f'<div class="strip">\n{"".join(figures)}</div>\n'
    )


def _animate(path: Path) -> str:
    """Returns a small animation as a data: URI; "" if the clip does not decode."""
    try:
        info = probe(path)
        frames_TYX3 = read_clip(path, info, Bucket(info.width_px, info.height_px, info.frames_24))
    except BadInput:  # it is being written
        return ""
    every = max(2, -(-len(frames_TYX3) // _MAX_FRAMES))
    small = shrink_frames(frames_TYX3[::every], longest_px=ANIMATION_PX)
    webp = encode_animation(small, kind="WEBP", fps=FPS / every)
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _write_others(run_dir: Path, out: Path, without: set[Path]) -> str:
    files = sorted(path for path in (run_dir / SAMPLES).rglob("*") if path.is_file())
    shown = []
    for path in [path for path in files if path not in without][-MAX_SAMPLES:]:
        if picture := _read_picture(path):
            name = html.escape(str(path.relative_to(run_dir / SAMPLES)))
            image = f'<img alt="{name}" src="{picture}">'
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                image = _link(image, path, out)
            shown.append(f"<div>{image}{name}</div>\n")
    return f'<div class="samples">\n{"".join(shown)}</div>\n' if shown else ""


def _read_picture(path: Path) -> str:
    """Returns a picture, or the first frame of a clip, as a data: URI; "" if it is neither."""
    try:
        info = probe(path)
        longest_px = min(SAMPLE_PX, max(info.width_px, info.height_px))
        return make_thumbnail(path, info, longest_px=longest_px, quality=82)
    except BadInput:  # a prompt's text file, or a clip that is being written
        return ""


def _link(image: str, path: Path, out: Path) -> str:
    if not path.is_relative_to(out.parent):
        return image
    return f'<a href="{html.escape(path.relative_to(out.parent).as_posix())}">{image}</a>'
