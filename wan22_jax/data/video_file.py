"""How does a clip become a file that people can watch, and what does such a file say of itself?

mp4, GIF and WebP are encoded while frames arrive; PNG is a folder of frames, or one picture. The
settings that made a clip travel in it as one JSON text: the comment of an mp4 file or a GIF,
EXIF's UserComment in WebP, the text `parameters` in each PNG. No more than a few frames are in
memory as pixels; those of a GIF wait on disk until the palette of the whole clip is known.
"""

import io
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wan22_jax.data.video import DAMAGED_IMAGE, open_video
from wan22_jax.errors import BadInput
from wan22_jax.geometry import FPS
from wan22_jax.outputs import check_output, replacing

VIDEO_SUFFIXES = (".mp4", ".gif", ".webp", ".png")

_MAKER = "wan22-jax"  # in each PNG: only what has it is replaced
_EXIF_IFD, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"


def write_video(
    path: Path,
    chunks: Iterable[np.ndarray],
    *,
    width_px: int,
    height_px: int,
    fps: int = FPS,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes frames in the format of the path's suffix and returns how many there were.

    The file, or the folder of PNG frames (see `written_path`), appears under its name when it is
    complete, and not at all when anything fails; what was there before is replaced. GIF and WebP
    loop for ever.

    Args:
        path: of the file, with one of VIDEO_SUFFIXES, in a folder that exists.
        chunks: pieces of the clip, uint8 [T, Y, X, 3].
        width_px: of every frame, even in an mp4 file.
        height_px: of every frame, even in an mp4 file.
        fps: frames a second; a PNG does not say.
        metadata: for `read_metadata`; values that JSON does not have are written as text.

    Raises:
        BadInput: another suffix, or a folder in the way that holds more than frames of ours.
        ValueError: no frame, or one of another size.
    """
    suffix = _check_suffix(path)
    text = None if metadata is None else _to_json(metadata)
    frames = _list_frames(chunks, (height_px, width_px, 3))
    if suffix == ".png":
        return _write_pictures(path, frames, text)
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp}[suffix]
    with replacing(path) as partial:
        return write(partial, frames, (width_px, height_px), fps, text)


def written_path(path: Path, *, num_frames: int) -> Path:
    """Says where a clip is once written: at `path`, but several PNG frames are in a folder."""
    return path.with_suffix("") if path.suffix.lower() == ".png" and num_frames > 1 else path


def check_video_path(path: Path, *, flag: str = "--out", num_frames: int | None = None) -> None:
    """Refuses a path that a video cannot be written to.

    Args:
        path: as the user gave it.
        flag: that it came with.
        num_frames: of the clip, if known: a single PNG needs no folder of its own.

    Raises:
        BadInput: another suffix than VIDEO_SUFFIXES, a folder of that name, a parent that cannot
            be made or written, or a folder in the way of PNG frames.
    """
    _check_suffix(path, flag=flag)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; choose another file with {flag}")
    check_output(path)
    if (folder := written_path(path, num_frames=num_frames or 2)) != path:
        _check_frames_folder(folder)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Reads the settings in a file, or folder of frames, of `write_video`; None if it has none.

    Args:
        path: a file with one of VIDEO_SUFFIXES, a folder of PNG frames, or the .png that it was
            asked for as.

    Raises:
        BadInput: there is no such file or frame, or it is damaged or of another kind.
    """
    file = path
    if not path.is_file():
        folder = path if path.is_dir() else written_path(path, num_frames=2)
        frames = folder.glob("[0-9]*.png")
        file = min(frames, default=path, key=lambda frame: (len(frame.name), frame.name))
    if not file.is_file():
        raise BadInput(f"{path}: no such video or folder of frames; check the path")
    text = _read_comment(file) if _check_suffix(file) == ".mp4" else _read_image_text(file)
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):  # there is none, or another maker's
        return None
    return metadata if isinstance(metadata, dict) else None


def _check_suffix(path: Path, *, flag: str = "") -> str:
    suffix = path.suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        kinds = f"{', '.join(VIDEO_SUFFIXES[:-1])} or {VIDEO_SUFFIXES[-1]}"
        if flag:
            raise BadInput(f"{path}: {flag} takes an {kinds} file; write e.g. {flag} out.mp4")
        raise BadInput(f"{path}: an {kinds} file was expected; choose e.g. out.mp4")
    return suffix


def _check_frames_folder(folder: Path) -> None:
    """Raises BadInput if something is there that a folder of frames must not replace."""
    if not os.path.lexists(folder):
        return
    remedy = "move it away or choose another name"
    if folder.is_symlink() or not folder.is_dir():
        raise BadInput(f"{folder}: frames go to a folder of this name, it is a file; {remedy}")
    for file in sorted(folder.iterdir()):
        if not _is_own_frame(file):
            raise BadInput(
                f"{folder}: frames would replace this folder, but {file.name} in it is none of "
                f"an earlier clip; {remedy}"
            )


def _is_own_frame(file: Path) -> bool:
    if file.is_symlink() or not re.fullmatch(r"[0-9]{4,}\.png", file.name):
        return False
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == _MAKER
    except DAMAGED_IMAGE:
        return False


def _to_json(metadata: Mapping[str, Any]) -> str:
    text = json.dumps(dict(metadata), ensure_ascii=False, default=str)
    # What is no UTF-8 on a command line comes as lone surrogates; JSON reads them from '\\udcff'.
    return text.encode("utf-8", "backslashreplace").decode()


def _list_frames(chunks: Iterable[np.ndarray], shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    frame_YX3 = None
    for frame_YX3 in chain.from_iterable(chunks):
        if frame_YX3.shape != shape:
            raise ValueError(f"a frame of shape {shape} was expected, got {frame_YX3.shape}")
        yield frame_YX3
    if frame_YX3 is None:
        raise ValueError("a clip of at least one frame was expected")


def _to_video_frames(frames: Iterable[np.ndarray], time_base: Fraction) -> Iterator[av.VideoFrame]:
    for index, frame_YX3 in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(frame_YX3, format="rgb24")
        frame.pts, frame.time_base = index, time_base
        yield frame


def _write_mp4(
    path: Path, frames: Iterator[np.ndarray], size: tuple[int, int], fps: int, text: str | None
) -> int:
    num_frames = 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        if text is not None:
            container.metadata["comment"] = text
        # Quality 8 of the original's imageio writer is libx264's CRF 10.
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for frame in _to_video_frames(frames, Fraction(1, fps)):
            container.mux(stream.encode(frame))
            num_frames += 1
        container.mux(stream.encode(None))
    return num_frames


def _write_webp(
    path: Path, frames: Iterator[np.ndarray], size: tuple[int, int], fps: int, text: str | None
) -> int:
    # Each frame is whole: libwebp's encoder of animations leaves pixels that changed little as they
    # were, which shows as traces of what moved, and Pillow hands it the clip only once it holds all
    # of it. The chunks are those of the WebP Container Specification.
    num_frames, has_exif = 0, 0x08 if text is not None else 0
    sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
    with path.open("wb") as file:
        file.write(bytes(12))
        file.write(_pack_chunk(b"VP8X", bytes([0x02 | has_exif, 0, 0, 0]) + sides))
        file.write(_pack_chunk(b"ANIM", bytes(6)))  # background; loops for ever
        for frame_YX3 in frames:
            picture = io.BytesIO()
            Image.fromarray(frame_YX3).save(picture, "WEBP", quality=90)
            start_ms, end_ms = (round(1000 * n / fps) for n in (num_frames, num_frames + 1))
            shown = (end_ms - start_ms).to_bytes(3, "little") + b"\x02"  # in place of all before
            content = bytes(6) + sides + shown + picture.getvalue()[12:]
            file.write(_pack_chunk(b"ANMF", content))
            num_frames += 1
        if text is not None:
            file.write(_pack_chunk(b"EXIF", _make_exif(text)))
        length = file.tell()
        file.seek(0)
        file.write(struct.pack("<4sI4s", b"RIFF", length - 8, b"WEBP"))
    return num_frames


def _pack_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)


def _make_exif(text: str) -> bytes:
    exif = Image.Exif()
    exif.endian = ">"
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
    return exif.tobytes().removeprefix(b"Exif\0\0")


def _write_gif(
    path: Path, frames: Iterator[np.ndarray], size: tuple[int, int], fps: int, text: str | None
) -> int:
    (width_px, height_px), num_frames = size, 0
    with tempfile.TemporaryFile(dir=path.parent) as pixels:

        def keep() -> Iterator[np.ndarray]:
            nonlocal num_frames
            for frame_YX3 in frames:
                pixels.write(frame_YX3.tobytes())
                num_frames += 1
                yield frame_YX3

        def kept() -> Iterator[np.ndarray]:
            pixels.seek(0)
            for _ in range(num_frames):
                flat = np.frombuffer(pixels.read(height_px * width_px * 3), np.uint8)
                yield flat.reshape(height_px, width_px, 3)

        # One palette for the clip: with one for each frame, what rests would flicker.
        time_base = Fraction(1, fps)
        palette = _make_palette(_to_video_frames(keep(), time_base), size, time_base)
        encoded = io.BytesIO()
        with av.open(encoded, "w", format="gif", options={"loop": "0"}) as container:
            stream = container.add_stream("gif", rate=fps)
            (stream.width, stream.height), stream.pix_fmt = size, "pal8"
            coloured = _to_video_frames(kept(), time_base)
            for frame in _apply_palette(coloured, palette, size, time_base):
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    path.write_bytes(_put_comment(encoded.getvalue(), text))
    return num_frames


def _make_palette(
    frames: Iterator[av.VideoFrame], size: tuple[int, int], time_base: Fraction
) -> av.VideoFrame:
    graph = av.filter.Graph()
    source = _add_source(graph, size, "rgb24", time_base)
    make, sink = graph.add("palettegen"), graph.add("buffersink")
    source.link_to(make)
    make.link_to(sink)
    graph.configure()
    (palette,) = _pass_through(frames, source, sink)
    return palette


def _apply_palette(
    frames: Iterator[av.VideoFrame],
    palette: av.VideoFrame,
    size: tuple[int, int],
    time_base: Fraction,
) -> Iterator[av.VideoFrame]:
    graph = av.filter.Graph()
    source = _add_source(graph, size, "rgb24", time_base)
    colours = _add_source(graph, (palette.width, palette.height), palette.format.name, time_base)
    # Dithers again only the part of a frame that differs from the one before.
    use, sink = graph.add("paletteuse", "diff_mode=rectangle"), graph.add("buffersink")
    source.link_to(use, 0, 0)
    colours.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    colours.push(palette)
    colours.push(None)
    yield from _pass_through(frames, source, sink)  # the graph lives as long as this runs


def _add_source(
    graph: av.filter.Graph, size: tuple[int, int], pixels: str, time_base: Fraction
) -> Any:
    options = f"video_size={size[0]}x{size[1]}:pix_fmt={pixels}:time_base={time_base}"
    return graph.add("buffer", options)


def _pass_through(frames: Iterator[av.VideoFrame], source: Any, sink: Any) -> Iterator[Any]:
    for frame in chain(frames, [None]):
        source.push(frame)
        while True:
            try:
                filtered = sink.pull()
            except (BlockingIOError, EOFError):  # wants more, or is done
                break
            yield filtered


def _put_comment(gif: bytes, text: str | None) -> bytes:
    if text is None:
        return gif
    flags = gif[10]
    start = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)  # after the palette
    content = text.encode()
    pieces = [content[at : at + 255] for at in range(0, len(content), 255)]
    blocks = b"".join(bytes([len(piece)]) + piece for piece in pieces)
    return gif[:start] + b"\x21\xfe" + blocks + b"\0" + gif[start:]


def _write_pictures(path: Path, frames: Iterator[np.ndarray], text: str | None) -> int:
    first = list(islice(frames, 2))
    target = written_path(path, num_frames=len(first))
    if target != path:
        _check_frames_folder(target)
    info = PngInfo()
    info.add_text("Software", _MAKER)
    if text is not None:
        info.add_itxt("parameters", text)
    num_frames = 0
    with replacing(target) as partial:
        if target == path:
            Image.fromarray(first[0]).save(partial, format="PNG", pnginfo=info)
            return 1
        partial.mkdir()
        for frame_YX3 in chain(first, frames):
            Image.fromarray(frame_YX3).save(partial / f"{num_frames:04}.png", pnginfo=info)
            num_frames += 1
    return num_frames


def _read_comment(path: Path) -> str:
    with open_video(path) as (container, _):
        return container.metadata.get("comment", "")


def _read_image_text(path: Path) -> str:
    try:
        with Image.open(path) as image:
            if image.format == "GIF":
                return image.info.get("comment", b"").decode(errors="replace")
            if image.format == "WEBP":
                comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
                is_ours = isinstance(comment, bytes) and comment.startswith(_UNICODE)
                return comment[len(_UNICODE) :].decode("utf-16-be", "replace") if is_ours else ""
            return image.info.get("parameters", "")
    except DAMAGED_IMAGE as error:
        raise BadInput(f"{path}: does not open ({error}); make it again") from None
