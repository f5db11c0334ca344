"""What is in a media file, and which pixels does a bucket take from it?

The frame choice and the resize are diffusion-pipe's (its models/base.py, with ComfyUI's reader):
resample to 24 fps by index, keep the first frames, scale to cover, cut the centre, bicubic. Unlike
there, rotation and EXIF orientation count in the size too, and only frames in use are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from PIL import Image, ImageOps

from wan22_jax.errors import BadInput
from wan22_jax.geometry import FPS, Bucket

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"]
)
IMAGE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp"])


class MediaInfo(NamedTuple):
    """One media file, as displayed."""

    width_px: int  # after rotation
    height_px: int
    frames: int  # in the file; 1 for an image
    fps: Fraction  # of the file; 24 for an image
    is_image: bool

    @property
    def frames_24(self) -> int:
        """How many frames there are once resampled to 24 fps."""
        return int(self.frames * FPS / self.fps)


def probe(path: Path) -> MediaInfo:
    """Reads size, frame count and rate, and checks that the file is whole and starts to decode.

    A video is read through but not decoded beyond its first frame; an image is decoded.

    Raises:
        BadInput: the file is truncated, damaged or not of the kind its suffix says.
    """
    return _probe_image(path) if path.suffix.lower() in IMAGE_SUFFIXES else _probe_video(path)


def read_clip(path: Path, info: MediaInfo, bucket: Bucket) -> np.ndarray:
    """Decodes the first ``bucket.frames`` frames at 24 fps, cropped to the bucket.

    Returns:
        uint8 [T, Y, X, 3] in pixels, T = ``bucket.frames``.

    Raises:
        BadInput: a frame does not decode, or fewer decode than the bucket needs.
    """
    if info.is_image:
        return _fit(_read_image(path), bucket)[None]
    return _read_video(path, info, bucket)


def resample_indices(frames: int, fps: Fraction) -> np.ndarray:
    """Picks the source frame of each frame at 24 fps: truncated steps from the first to the last.

    diffusion-pipe's ``torch.linspace(0, n - 1, n').int()``, with the float32 rounding of
    PyTorch's kernel (fused multiply-add from the nearer end): it decides which frame a step that
    falls on a whole number takes.
    """
    count = int(frames * FPS / fps)
    if count < 2:
        return np.zeros(count, np.int64)
    step = np.float64(np.float32(frames - 1) / np.float32(count - 1))
    from_first = (step * np.arange(count)).astype(np.float32)
    from_last = (frames - 1 - step * np.arange(count)[::-1]).astype(np.float32)
    return np.where(np.arange(count) < count // 2, from_first, from_last).astype(np.int64)


def _probe_image(path: Path) -> MediaInfo:
    width_px, height_px = _read_image(path).size
    return MediaInfo(width_px, height_px, 1, Fraction(FPS), is_image=True)


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            # MPO: a photo that carries a second view or a preview.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise BadInput(f"{path}: is an animation; make it an mp4 file")
            if image.mode[0] in "IF":  # Pillow would clip, not scale, these to 8 bits
                raise BadInput(f"{path}: has more than 8 bits of grey; save it with 8 bits")
            return _flatten(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(
            f"{path}: does not decode as an image ({error}); replace or remove it"
        ) from None


def _probe_video(path: Path) -> MediaInfo:
    first = None
    packets = kept = 0
    damaged = False
    with _open_video(path) as (container, stream):
        # mp4 lists its packets up front, so a cut file shows; other formats promise nothing.
        promised = len(stream.index_entries) if "mp4" in container.format.name else 0
        for packet in container.demux(stream):
            if packet.size:
                packets += 1
                kept += not packet.is_discard  # outside the file's edit list: never decoded
                damaged |= packet.is_corrupt
            if first is None:
                first = next(iter(packet.decode()), None)
        fps = stream.average_rate or stream.guessed_rate
    if damaged or packets < promised:
        raise BadInput(
            f"{path}: is truncated ({packets} of {promised or 'more'} frames); "
            "copy it again or remove it"
        )
    if first is None or not fps:
        raise BadInput(f"{path}: has no frame that decodes; re-encode or remove it")
    sides = (first.width, first.height)
    width_px, height_px = sides[::-1] if _quarter_turns(first) % 2 else sides
    return MediaInfo(width_px, height_px, kept, Fraction(fps), is_image=False)


def _read_video(path: Path, info: MediaInfo, bucket: Bucket) -> np.ndarray:
    wanted = resample_indices(info.frames, info.fps)[: bucket.frames]
    if len(wanted) < bucket.frames:
        raise BadInput(
            f"{path}: {info.frames} frames decode, {len(wanted)} at {FPS} fps; bucket {bucket} "
            "needs more; re-encode or remove it"
        )
    clip_TYX3 = np.empty((bucket.frames, bucket.height_px, bucket.width_px, 3), np.uint8)
    decoded = 0
    with _open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise BadInput(f"{path}: frame {decoded} is damaged; re-encode or remove it")
            start, stop = np.searchsorted(wanted, (decoded, decoded + 1))
            if start < stop:
                clip_TYX3[start:stop] = _fit(_frame_to_image(frame), bucket)
            decoded += 1
            if decoded > wanted[-1]:
                return clip_TYX3
    # The container counted more frames than there are: the 24 fps grid spans those that exist.
    return _read_video(path, info._replace(frames=decoded), bucket)


# PyAV before 19 stops at a title that is not UTF-8; from 19 on it replaces what it cannot read.
_LENIENT: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        with av.open(str(path), **_LENIENT) as container:
            if not container.streams.video:
                raise BadInput(f"{path}: has no video stream; remove it")
            yield container, container.streams.video[0]
    # IndexError: PyAV meets a stream that turns up in the middle of the file.
    except (av.error.FFmpegError, IndexError) as error:
        raise BadInput(
            f"{path}: does not decode as a video ({error}); re-encode or remove it"
        ) from None


def _frame_to_image(frame: av.VideoFrame) -> Image.Image:
    has_alpha = any(component.is_alpha for component in frame.format.components)
    pixels_YXC = frame.to_ndarray(format="rgba" if has_alpha else "rgb24")
    pixels_YXC = np.rot90(pixels_YXC, _quarter_turns(frame))
    return _flatten(Image.fromarray(np.ascontiguousarray(pixels_YXC)))


def _quarter_turns(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4  # counterclockwise, as np.rot90


def _flatten(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _fit(image: Image.Image, bucket: Bucket) -> np.ndarray:
    size = (bucket.width_px, bucket.height_px)
    return np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC))
