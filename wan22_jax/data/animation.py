"""How do frames become a small picture that moves, for a page or TensorBoard to hold inside?"""

import io
from collections.abc import Iterable
from typing import Literal

import numpy as np
from PIL import Image


def shrink_frames(frames: Iterable[np.ndarray], *, longest_px: int) -> list[Image.Image]:
    """Scales frames down, never up.

    Args:
        frames: uint8 [Y, X, 3] each, all of one size.
        longest_px: the longer side of the result, at most.
    """
    small = []
    for frame_YX3 in frames:
        picture = Image.fromarray(frame_YX3)
        picture.thumbnail((longest_px, longest_px), Image.Resampling.BOX)
        small.append(picture)
    return small


def encode_animation(
    frames: list[Image.Image], *, kind: Literal["GIF", "WEBP"], fps: float
) -> bytes:
    """Encodes frames, one or more, that play without end."""
    first, *others = frames
    options = {} if kind == "GIF" else {"quality": 60, "method": 2}
    encoded = io.BytesIO()
    first.save(
        encoded,
        kind,
        save_all=True,
        append_images=others,
        duration=round(1000 / fps),
        loop=0,
        **options,
    )
    return encoded.getvalue()
