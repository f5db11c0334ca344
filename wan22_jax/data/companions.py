"""The pictures that belong to a clip: the mask of its loss, and its first frame.

A mask is diffusion-pipe's: the red channel of an image as large as the clip, scaled and cropped
with it, 1 where the loss counts; on the latent grid by nearest-exact. The first frame is the
picture from which image-to-video starts. Training takes it from the clip itself, so a picture that
is given has to show the same.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from wan22_jax.data.video import IMAGE_SUFFIXES, MediaInfo, open_image, read_clip
from wan22_jax.errors import BadInput
from wan22_jax.geometry import SPACE_STRIDE, Bucket

# Of the mean difference of 64 x 64 pixels in 0..255. H.264 at CRF 30 costs coloured noise 3, at CRF
# 40 it costs 7; the same noise moved by 8 of 640 pixels differs by 16.
FIRST_FRAME_TOLERANCE = 8
_COMPARED = Bucket(64, 64, 1)


def list_companions(folder: Path) -> dict[str, Path]:
    """Lists the images below a folder by their path without suffix, relative to it.

    Raises:
        BadInput: there is no such folder, or two images have the same name but for the suffix.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; correct the path in the dataset file")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise BadInput(f"{path}: {found[name].name} has the same name; remove one of them")
            found[name] = path
    return found


def list_unused(companions: dict[str, Path], files: Iterable[str]) -> list[Path]:
    """Lists the companions that none of the clips has."""
    names = {file.rpartition(".")[0] for file in files}
    return [path for name, path in companions.items() if name not in names]


def list_without(companions: dict[str, Path], files: Sequence[str]) -> list[str]:
    """Lists the files that have no companion."""
    return [file for file in files if file.rpartition(".")[0] not in companions]


def check_mask(path: Path, info: MediaInfo) -> str:
    """Checks that a mask is an image of the clip's size; returns the sha256 of its bytes.

    Raises:
        BadInput: it is not.
    """
    with _open_mask(path) as image:
        if image.size != (info.width_px, info.height_px):
            raise BadInput(
                f"{path}: the mask has {image.width}x{image.height} pixels, its clip "
                f"{info.width_px}x{info.height_px}; they must be equal"
            )
    return digest_file(path)


def read_mask(path: Path, info: MediaInfo, bucket: Bucket) -> np.ndarray:
    """Reads the mask of a clip on the latent grid of a bucket.

    Returns:
        float32 [Y, X] in 0..1, 1 where the loss counts.

    Raises:
        BadInput: it is not an image, or not as large as the clip.
    """
    check_mask(path, info)
    size = (bucket.width_px, bucket.height_px)
    with _open_mask(path) as image:
        mask_px = np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC), np.float32) / 255
    centre = SPACE_STRIDE // 2  # nearest-exact: floor((i + 0.5) * stride)
    return mask_px[centre::SPACE_STRIDE, centre::SPACE_STRIDE]


def check_first_frame(picture: Path, video: Path, info: MediaInfo) -> None:
    """Checks that a picture shows the first frame of a video, but for what a codec loses.

    Raises:
        BadInput: another shape or another content.
    """
    with open_image(picture) as image:
        width_px, height_px = ImageOps.exif_transpose(image).size
    stretch = (width_px / height_px) / (info.width_px / info.height_px)
    if abs(math.log(stretch)) > 0.03:
        raise BadInput(
            f"{picture}: has {width_px}x{height_px} pixels, its clip {info.width_px}x"
            f"{info.height_px}; a first frame must have the clip's shape"
        )
    of_picture = MediaInfo(width_px, height_px, 1, info.fps, is_image=True)
    shown_YX3 = read_clip(picture, of_picture, _COMPARED)[0].astype(np.float32)
    filmed_YX3 = read_clip(video, info, _COMPARED)[0].astype(np.float32)
    difference = np.abs(shown_YX3 - filmed_YX3).mean()
    if difference > FIRST_FRAME_TOLERANCE:
        raise BadInput(
            f"{picture}: does not show the first frame of {video.name} (they differ by "
            f"{difference:.1f} of 255, allowed are {FIRST_FRAME_TOLERANCE}); replace or remove it"
        )


def digest_file(path: Path) -> str:
    """Returns the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_mask(path: Path) -> Image.Image:
    with open_image(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB").getchannel(0)
