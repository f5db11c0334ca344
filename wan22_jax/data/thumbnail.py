"""How does a picture, or the first frame of a clip, get into an HTML page?"""

import base64
import io
from pathlib import Path

from PIL import Image

from wan22_jax.data.video import MediaInfo, read_clip
from wan22_jax.geometry import Bucket


def make_thumbnail(path: Path, info: MediaInfo, *, longest_px: int, quality: int) -> str:
    """Returns a small JPEG as a data: URI.

    Args:
        path: the file.
        info: what ``probe`` found in it.
        longest_px: the longer of its sides.
        quality: of the JPEG, up to 95.

    Raises:
        BadInput: it does not decode.
    """
    scale = longest_px / max(info.width_px, info.height_px)
    width_px, height_px = (max(1, round(x * scale)) for x in (info.width_px, info.height_px))
    (pixels_YX3,) = read_clip(path, info, Bucket(width_px, height_px, 1))
    jpeg = io.BytesIO()
    Image.fromarray(pixels_YX3).save(jpeg, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
