"""What does a folder of training clips look like? Moving shapes of several sizes and rates."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from wan22_jax.data.video_file import write_video

DURATION_S = 1.25
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 50, 50),
    "green": (60, 180, 75),
    "blue": (60, 90, 220),
    "yellow": (235, 205, 50),
}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
SIZES = ((160, 96), (128, 128), (96, 160))  # pixels, width and height
RATES = (24, 30, 16)  # frames a second


class Scene(NamedTuple):
    """One shape on its way across the picture."""

    shape: str
    colour: str
    direction: str

    @property
    def caption(self) -> str:
        """What the caption file says."""
        return f"A {self.colour} {self.shape} moves {self.direction} on a grey background."


def list_scenes() -> list[Scene]:
    """Returns every shape in every colour."""
    directions = list(DIRECTIONS)
    return [
        Scene(shape, colour, directions[(row + column) % len(directions)])
        for row, shape in enumerate(SHAPES)
        for column, colour in enumerate(COLOURS)
    ]


def write_clips(folder: Path) -> list[Path]:
    """Writes a dozen H.264 clips and two still pictures with captions; returns the media files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, scene in enumerate(list_scenes()):
        (width_px, height_px), fps = SIZES[number % 3], RATES[number // 4]
        path = folder / f"{scene.colour}_{scene.shape}.mp4"
        frames = _draw_frames(scene, width_px, height_px, count=round(DURATION_S * fps))
        write_video(path, frames, width_px=width_px, height_px=height_px, fps=fps)
        path.with_suffix(".txt").write_text(scene.caption + "\n", "utf-8")
        files.append(path)
    for scene, width_px in zip(list_scenes(), (128, 192), strict=False):
        path = folder / f"{scene.colour}_{scene.shape}_still.png"
        draw_scene(scene, width_px, 128, progress=0.5).save(path)
        caption = f"A {scene.colour} {scene.shape} on a grey background."
        path.with_suffix(".txt").write_text(caption + "\n", "utf-8")
        files.append(path)
    return files


def draw_scene(scene: Scene, width_px: int, height_px: int, *, progress: float) -> Image.Image:
    """Draws the moment ``progress`` in [0, 1] of a scene."""
    image = Image.new("RGB", (width_px, height_px), (200, 200, 200))
    radius = min(width_px, height_px) / 5
    step_x, step_y = DIRECTIONS[scene.direction]
    x = width_px / 2 + step_x * (progress - 0.5) * (width_px - 2 * radius)
    y = height_px / 2 + step_y * (progress - 0.5) * (height_px - 2 * radius)
    box = (x - radius, y - radius, x + radius, y + radius)
    draw, colour = ImageDraw.Draw(image), COLOURS[scene.colour]
    if scene.shape == "circle":
        draw.ellipse(box, fill=colour)
    elif scene.shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), (x, box[1])], fill=colour)
    return image


def _draw_frames(
    scene: Scene, width_px: int, height_px: int, *, count: int
) -> Iterator[np.ndarray]:
    for index in range(count):
        image = draw_scene(scene, width_px, height_px, progress=index / (count - 1))
        yield np.asarray(image)[None]
