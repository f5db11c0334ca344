"""How does a picture become the first frame of a video?

As in Wan2.2's image-to-video: the output size follows the picture's aspect ratio, the picture is
scaled to cover it (Lanczos) and cropped at the centre.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from wan22_jax.errors import BadInput
from wan22_jax.geometry import SIZE_MULTIPLE


def open_picture(path: Path) -> Image.Image:
    """Reads a picture as RGB, upright; transparent parts become white.

    Raises:
        BadInput: there is no such file, or it is not a picture.
    """
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such picture; check the path") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise BadInput(
            f"{path}: expected a picture, but {error}; save it as PNG or JPEG"
        ) from error
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright).convert("RGB")


def best_output_size(
    width_px: int, height_px: int, *, area_px: int = 1280 * 704, source: str = "picture"
) -> tuple[int, int]:
    """Chooses the width and height of the video for a picture, as Wan2.2's best_output_size.

    Of two candidates of at most `area_px` pixels (width rounded down first, or height first) it
    takes the one nearer to the picture's aspect ratio; sides are multiples of 32.

    Raises:
        BadInput: a side would be under 32 pixels; `source` names the culprit.
    """
    aspect = width_px / height_px
    ideal_width, ideal_height = math.sqrt(area_px * aspect), math.sqrt(area_px / aspect)
    if min(ideal_width, ideal_height) < SIZE_MULTIPLE:
        raise BadInput(
            f"{source}: {width_px}x{height_px} is too narrow for a video of {area_px} pixels; "
            f"both sides must come to {SIZE_MULTIPLE} or more: crop it or ask for a larger video"
        )
    width_first = _round_down(ideal_width)
    by_width = (width_first, _round_down(area_px / width_first))
    height_first = _round_down(area_px / ideal_width)
    by_height = (_round_down(area_px / height_first), height_first)

    def stretch(size: tuple[int, int]) -> float:
        ratio = aspect / (size[0] / size[1])
        return max(ratio, 1 / ratio)

    return by_width if stretch(by_width) < stretch(by_height) else by_height


def crop_to_cover(picture: Image.Image, *, width_px: int, height_px: int) -> np.ndarray:
    """Scales the picture to cover the size and cuts its centre: [1, 1, Y, X, 3] in [-1, 1]."""
    scale = max(width_px / picture.width, height_px / picture.height)
    scaled = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
    )
    left, top = (scaled.width - width_px) // 2, (scaled.height - height_px) // 2
    cropped = scaled.crop((left, top, left + width_px, top + height_px))
    frame_YX3 = np.asarray(cropped, np.float32) / 255
    return ((frame_YX3 - 0.5) / 0.5)[None, None]


def _round_down(size_px: float) -> int:
    return int(size_px // SIZE_MULTIPLE) * SIZE_MULTIPLE
