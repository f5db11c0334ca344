"""Writes small media files whose pixels tell which frame they are."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def write_video(
    path: Path,
    frames: int,
    *,
    fps: int = 24,
    size: tuple[int, int] = (64, 48),
    rotation: int | None = None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    seed: int = 0,
    pix_fmt: str | None = None,
    gop: int | None = None,
    times: Sequence[int] | None = None,
) -> None:
    """Writes grey frames of brightness ``grey_of(i, seed)``, near lossless, top left part white.

    ``times`` says when each frame shows, in frames at ``fps``.
    """
    width, height = size
    even = "yuv444p" if width % 2 or height % 2 else "yuv420p"
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "2", **quiet})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt or even
        if gop is not None:
            stream.gop_size = gop
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            pixels = np.full((height, width, 3), grey_of(index, seed), np.uint8)
            pixels[: height // 4, : width // 4] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def grey_of(index: int, seed: int = 0) -> int:
    return (index * 2 + seed) % 230


def read_grey(clip_TYX3: np.ndarray) -> list[int]:
    """The brightness of each frame's bottom right corner, which ``grey_of`` gave it."""
    return clip_TYX3[:, -4:, -4:].mean((1, 2, 3)).round().astype(int).tolist()


def write_image(
    path: Path, size: tuple[int, int], *, grey: int = 100, orientation: int = 1
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (grey, grey, grey)).save(path, exif=exif)
