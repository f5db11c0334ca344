"""What is in a media file, and which pixels does a bucket take from it?

The frame choice and the resize are diffusion-pipe's (its models/base.py, with ComfyUI's reader):
resample to 24 fps by index, keep a run of frames, scale to cover, cut the centre, bicubic. Unlike
there, rotation and EXIF orientation count in the size too, files of uneven rate are resampled by
their time stamps, and only frames in use are kept.
"""

import functools
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageOps

from wan22_jax.errors import BadInput
from wan22_jax.geometry import FPS, Bucket

VIDEO_SUFFIXES = frozenset(
    [
        *(".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"),
        *(".m2ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv"),
    ]
)
IMAGE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
SLOWEST_FPS, FASTEST_FPS = Fraction(1, 10), 1000


# From 90 megapixels on, which photos have; at twice that it refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class MediaInfo(NamedTuple):
    """One media file, as displayed."""

    width_px: int  # after rotation
    height_px: int
    frames: int  # in the file; 1 for an image
    fps: Fraction  # of the file; 24 for an image
    is_image: bool
    is_uneven: bool = False  # frames are not at even times; fps is their mean rate

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


def read_clip(path: Path, info: MediaInfo, bucket: Bucket, *, start: int = 0) -> np.ndarray:
    """Decodes ``bucket.frames`` frames at 24 fps, cropped to the bucket.

    Args:
        path: of a video or image.
        info: of ``probe``; another ``fps`` than the file's re-times it.
        bucket: size and number of frames.
        start: first frame, counted at 24 fps; decoding begins at the key frame before it.

    Returns:
        uint8 [T, Y, X, 3] in pixels, T = ``bucket.frames``.

    Raises:
        BadInput: a frame does not decode, or fewer decode than the bucket needs.
    """
    if info.is_image:
        return _fit(_read_image(path), bucket)[None]
    return _read_video(path, info, bucket, start)


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


def check_readable(image: Image.Image, path: Path) -> None:
    """Raises BadInput for an animation, and for depths that Pillow would clip to 8 bits."""
    # MPO: a photo that carries a second view or a preview.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise BadInput(f"{path}: is an animation; make it an mp4 file")
    if image.mode[0] in "IF":
        raise BadInput(f"{path}: has more than 8 bits of grey; save it with 8 bits")


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Opens an image; whatever goes wrong while it is in use is BadInput that names the file."""
    try:
        with Image.open(path) as image:
            check_readable(image, path)
            yield image
    except DAMAGED_IMAGE as error:
        raise BadInput(
            f"{path}: does not decode as an image ({error}); replace or remove it"
        ) from None


# What Pillow's decoders raise on damaged files.
DAMAGED_IMAGE = (
    *(OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, AttributeError),
    *(RuntimeError, MemoryError, AssertionError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


# PyAV before 19 stops at a title that is not UTF-8; from 19 on it replaces what it cannot read.
_LENIENT: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a video: container and stream; whatever goes wrong is BadInput, naming the file."""
    try:
        with av.open(str(path), **_LENIENT) as container:
            cover = Disposition.attached_pic  # of a song, or a poster
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise BadInput(f"{path}: has no video stream; remove it")
            yield container, streams[0]
    # IndexError: PyAV meets a stream that turns up in the middle of the file.
    except (av.error.FFmpegError, IndexError, ValueError, ArithmeticError, MemoryError) as error:
        raise BadInput(
            f"{path}: does not decode as a video ({error}); re-encode or remove it"
        ) from None


def _probe_image(path: Path) -> MediaInfo:
    width_px, height_px = _read_image(path).size
    return MediaInfo(width_px, height_px, 1, Fraction(FPS), is_image=True)


def _read_image(path: Path) -> Image.Image:
    with open_image(path) as image:
        return _flatten(ImageOps.exif_transpose(image))


def _probe_video(path: Path) -> MediaInfo:
    first = None
    packets = kept = 0
    damaged = False
    times: list[int | None] = []
    with open_video(path) as (container, stream):
        # mp4 lists its packets up front, so a cut file shows; other formats promise nothing.
        promised = len(stream.index_entries) if "mp4" in container.format.name else 0
        for packet in container.demux(stream):
            if packet.size:
                packets += 1
                if not packet.is_discard:  # outside the file's edit list: never decoded
                    kept += 1
                    times.append(packet.pts)
                damaged |= packet.is_corrupt
            if first is None:
                first = next(iter(packet.decode()), None)
        fps = stream.average_rate or stream.guessed_rate
        time_base = stream.time_base
    if damaged or packets < promised:
        raise BadInput(
            f"{path}: is truncated ({packets} of {promised or 'more'} frames); "
            "copy it again or remove it"
        )
    if first is None or not fps or not first.width or not first.height:
        raise BadInput(f"{path}: has no frame that decodes; re-encode or remove it")
    fps, is_uneven = Fraction(fps), False
    if (step := _find_uneven_step(times)) and time_base:
        fps, is_uneven = 1 / (step * time_base), True
    if not SLOWEST_FPS <= fps <= FASTEST_FPS:
        raise BadInput(f"{path}: says that it has {float(fps):g} frames a second; re-encode it")
    sides = (first.width, first.height)
    width_px, height_px = sides[::-1] if _quarter_turns(first) % 2 else sides
    return MediaInfo(width_px, height_px, kept, fps, is_image=False, is_uneven=is_uneven)


def _find_uneven_step(times: Sequence[int | None]) -> Fraction | None:
    """Returns the mean step between frames if one of them is off the even grid by more."""
    known = sorted(time for time in times if time is not None)
    if len(known) < max(len(times), 3) or known[0] == known[-1]:
        return None
    step = Fraction(known[-1] - known[0], len(known) - 1)
    since_first = np.array([time - known[0] for time in known], np.float64)
    off = np.abs(since_first - np.arange(len(known)) * float(step)).max()
    return step if off > step else None


def _read_video(path: Path, info: MediaInfo, bucket: Bucket, start: int) -> np.ndarray:
    times = _list_times(path, path.stat().st_mtime_ns) if start or info.is_uneven else []
    wanted = _choose_frames(info, times)[start : start + bucket.frames]
    if len(wanted) < bucket.frames:
        raise BadInput(
            f"{path}: {info.frames} frames decode, {start + len(wanted)} at {FPS} fps; bucket "
            f"{bucket} needs more; re-encode or remove it"
        )
    if wanted[0] and times:
        clip_TYX3, _ = _collect(bucket, wanted, _decode_near(path, int(wanted[0]), times))
        if clip_TYX3 is not None:
            return clip_TYX3
    clip_TYX3, decoded = _collect(bucket, wanted, _decode_all(path))
    if clip_TYX3 is not None:
        return clip_TYX3
    # The container counted more frames than there are: the 24 fps grid spans those that exist.
    return _read_video(path, info._replace(frames=decoded), bucket, start)


def _choose_frames(info: MediaInfo, times: Sequence[float]) -> np.ndarray:
    if not info.is_uneven or len(times) < info.frames:
        return resample_indices(info.frames, info.fps)
    # A frame shows from its own time on; a quarter later, as containers round times to 1 ms.
    at = (np.arange(info.frames_24) + 0.25) / FPS
    shown = np.searchsorted(np.subtract(times[: info.frames], times[0]), at, side="right") - 1
    return np.maximum(shown, 0)


def _collect(
    bucket: Bucket, wanted: np.ndarray, frames: Iterator[tuple[int, av.VideoFrame]]
) -> tuple[np.ndarray | None, int]:
    """Returns the clip, or None and how many frames there were if they end before it does."""
    clip_TYX3 = np.empty((bucket.frames, bucket.height_px, bucket.width_px, 3), np.uint8)
    decoded = 0
    for index, frame in frames:
        begin, end = np.searchsorted(wanted, (index, index + 1))
        if begin < end:
            clip_TYX3[begin:end] = _fit(_frame_to_image(frame), bucket)
        decoded = index + 1
        if decoded > wanted[-1]:
            return clip_TYX3, decoded
    return None, decoded


def _decode_all(path: Path) -> Iterator[tuple[int, av.VideoFrame]]:
    with open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise BadInput(f"{path}: frame {index} is damaged; re-encode or remove it")
            yield index, frame


def _decode_near(
    path: Path, first: int, times: Sequence[float]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields the frames from ``first`` on, or ends at once where seeking does not lead there.

    Frames after a seek know their time alone, so each is looked up; one that is missing, damaged
    or out of order ends it, and the caller decodes from the beginning instead.
    """
    index_of: dict[float | None, int] = {time: index for index, time in enumerate(times)}
    with open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        container.seek(round(times[first] / stream.time_base), stream=stream)
        expected = None
        for frame in container.decode(stream):
            index = index_of.get(_seconds(frame.pts, stream))
            if index is None or frame.is_corrupt or expected not in (None, index):
                return
            if index > first and expected is None:
                return
            expected = index + 1
            if index >= first:
                yield index, frame


@functools.lru_cache(8)  # several clips of one file follow each other
def _list_times(path: Path, mtime_ns: int) -> list[float]:  # noqa: ARG001 (part of the key)
    """Lists when each frame shows, ascending; empty if the file does not say for each."""
    with open_video(path) as (container, stream):
        packets = (p for p in container.demux(stream) if p.size and not p.is_discard)
        times = [_seconds(packet.pts, stream) for packet in packets]
    known = sorted(time for time in times if time is not None)
    return known if len(set(known)) == len(times) else []


def _seconds(pts: int | None, stream: Any) -> float | None:
    return None if pts is None else float(pts * stream.time_base)


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
