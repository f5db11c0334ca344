"""Videos on disk: what each format keeps of frames, times and settings; what is never lost."""

import errno
import json
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from wan22_jax.data.video_file import (
    VIDEO_SUFFIXES,
    check_video_path,
    read_metadata,
    write_video,
    written_path,
)
from wan22_jax.errors import BadInput, run_command

METADATA = {
    "prompt": "一只\"红\"猫 🐈 says 'hi' \\ 100%;\n=#" + " long" * 200,
    "seed": 3,
    "shift": 5.0,
    "image": None,
    "loras": ["a.safetensors", "风格"],
}
# Mean difference from the frames that were written, of 255.
CLOSENESS = {".mp4": 3, ".gif": 6, ".webp": 3, ".png": 0}


def make_frames(count=9, *, height_px=64, width_px=96):
    """Red grows to the right, green downwards, and both wander; a blue square goes across."""
    rows, columns = np.mgrid[:height_px, :width_px]
    frames_TYX3 = np.zeros((count, height_px, width_px, 3), np.uint8)
    for index, frame_YX3 in enumerate(frames_TYX3):
        frame_YX3[..., 0] = np.minimum(columns * 2 + index, 255)
        frame_YX3[..., 1] = np.minimum(rows * 2 + index, 255)
        frame_YX3[8:24, 4 * index : 4 * index + 16] = (20, 40, 230)
    return frames_TYX3


def write(path, frames_TYX3, **options):
    height_px, width_px = frames_TYX3.shape[1:3]
    chunks = [frames_TYX3[:1], frames_TYX3[1:5], frames_TYX3[5:]]
    return write_video(path, iter(chunks), width_px=width_px, height_px=height_px, **options)


def read(path):
    """Returns frames and how long each is shown, in seconds; none where the format is silent."""
    if path.is_dir():
        images = [Image.open(file) for file in sorted(path.iterdir())]
        return np.stack([np.asarray(image) for image in images]), []
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        times = [float(frame.pts * frame.time_base) for frame in frames]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), np.diff(times)
    shown, shown_s = [], []
    with Image.open(path) as image:
        for index in range(image.n_frames):
            image.seek(index)
            shown.append(np.asarray(image.convert("RGB")))
            shown_s.append(image.info.get("duration", 0) / 1000)
    return np.stack(shown), shown_s


def fail_in_the_middle():
    yield np.zeros((3, 64, 64, 3), np.uint8)
    raise OSError(errno.ENOSPC, "No space left on device", "a file")


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_a_file_holds_the_frames(tmp_path, suffix):
    path, frames = tmp_path / f"a{suffix}", make_frames()
    assert write(path, frames) == 9
    out = written_path(path, num_frames=9)
    assert list(tmp_path.iterdir()) == [out]
    assert out == (tmp_path / "a" if suffix == ".png" else path)
    shown, _ = read(out)
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - frames).mean() <= CLOSENESS[suffix]
    assert np.abs(shown[8, 12:20, 36:44].astype(int) - (20, 40, 230)).max() < 25


def test_mp4_is_h264_at_the_rate(tmp_path):
    for fps in (24, 16):
        write(tmp_path / "a.mp4", make_frames(), fps=fps)
        with av.open(str(tmp_path / "a.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", fps)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("fps", [24, 10])
def test_an_animation_keeps_time_and_loops(tmp_path, suffix, fps):
    path = tmp_path / f"a{suffix}"
    write(path, make_frames(25), fps=fps)
    shown_s = read(path)[1]
    smallest_s = 0.01 if suffix == ".gif" else 0.001
    assert np.abs(np.cumsum(shown_s) - np.arange(1, 26) / fps).max() <= smallest_s
    with Image.open(path) as image:
        assert image.info["loop"] == 0


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_sides_may_be_odd(tmp_path, suffix):
    frames = make_frames(3, height_px=33, width_px=65)
    write(tmp_path / f"a{suffix}", frames, metadata=METADATA)
    out = written_path(tmp_path / f"a{suffix}", num_frames=3)
    shown, _ = read(out)
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - frames).mean() <= CLOSENESS[suffix]
    assert read_metadata(out) == METADATA


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_a_clip_that_rests_keeps_its_frames(tmp_path, suffix):
    frames = np.full((5, 32, 32, 3), (200, 30, 90), np.uint8)
    write(tmp_path / f"a{suffix}", frames)
    shown, _ = read(written_path(tmp_path / f"a{suffix}", num_frames=5))
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - frames).max() <= 4


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_one_frame_is_one_file(tmp_path, suffix):
    path, frames = tmp_path / f"a{suffix}", make_frames(1)
    assert write(path, frames, metadata=METADATA) == 1
    assert written_path(path, num_frames=1) == path
    assert list(tmp_path.iterdir()) == [path]
    shown, _ = read(path)
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - frames).mean() <= CLOSENESS[suffix]
    assert read_metadata(path) == METADATA


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_metadata_comes_back(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    assert write(path, make_frames(3), metadata=METADATA) == 3
    assert read_metadata(written_path(path, num_frames=3)) == read_metadata(path) == METADATA
    write(path, make_frames(3))
    assert read_metadata(path) is None
    write(path, make_frames(3), metadata={})
    assert read_metadata(path) == {}
    # What is not JSON's, and a command line that is no UTF-8.
    write(path, make_frames(3), metadata={"model": Path("m"), "prompt": "a\udcff"})
    assert read_metadata(path) == {"model": "m", "prompt": "a\udcff"}


def test_other_programs_read_the_metadata(tmp_path):
    text = json.dumps(METADATA, ensure_ascii=False)
    for suffix in VIDEO_SUFFIXES:
        write(tmp_path / f"a{suffix}", make_frames(3), metadata=METADATA)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == text
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["comment"].decode() == text
    with Image.open(tmp_path / "a.webp") as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + text.encode("utf-16-be")
    for name in ("0000.png", "0002.png"):
        with Image.open(tmp_path / "a" / name) as image:
            assert image.text["parameters"] == text


def test_a_webp_is_made_of_whole_chunks(tmp_path):
    write(tmp_path / "a.webp", make_frames(3), metadata=METADATA)
    content = (tmp_path / "a.webp").read_bytes()
    assert struct.unpack("<4sI4s", content[:12]) == (b"RIFF", len(content) - 8, b"WEBP")
    at, names = 12, []
    while at < len(content):
        name, length = struct.unpack("<4sI", content[at : at + 8])
        names.append(name)
        at += 8 + length + length % 2
    assert at == len(content)
    assert names == [b"VP8X", b"ANIM", *[b"ANMF"] * 3, b"EXIF"]


def test_metadata_of_others_is_none(tmp_path):
    frame = Image.fromarray(make_frames(1)[0])
    frame.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0{}"
    frame.save(tmp_path / "a.webp", exif=exif)
    frame.save(tmp_path / "a.gif", comment=b"\xff made by hand")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["comment"] = "[1]"
        stream = container.add_stream("libx264", rate=Fraction(24))
        stream.width, stream.height = frame.size
        container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    assert [read_metadata(tmp_path / f"a{suffix}") for suffix in VIDEO_SUFFIXES] == [None] * 4


def test_metadata_of_nothing_is_refused(tmp_path):
    for name in ("a.mp4", "a.png", "a"):
        with pytest.raises(BadInput, match=rf"/{name}: no such video or folder of frames"):
            read_metadata(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: no such video or folder of frames"):
        read_metadata(tmp_path / "empty")
    for suffix in (*VIDEO_SUFFIXES, ".txt"):
        (tmp_path / f"text{suffix}").write_text("hello")
        with pytest.raises(BadInput, match=rf"text{suffix}: "):
            read_metadata(tmp_path / f"text{suffix}")


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_failure_leaves_no_file(tmp_path, capsys, suffix):
    path = tmp_path / f"a{suffix}"

    def write_half():
        write_video(path, fail_in_the_middle(), width_px=64, height_px=64, metadata=METADATA)

    assert run_command(write_half) == 2
    assert "the disk is full while writing a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_failure_keeps_the_file_before(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write(path, make_frames(3), metadata={"seed": 1})
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    assert len(before) == (3 if suffix == ".png" else 1)
    with pytest.raises(OSError, match="No space left"):
        write_video(path, fail_in_the_middle(), width_px=64, height_px=64)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_frames_of_another_size_and_none_at_all_are_errors(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(path, [], width_px=64, height_px=64)
    with pytest.raises(ValueError, match=r"a frame of shape \(64, 64, 3\) was expected"):
        write_video(path, [make_frames(2)], width_px=64, height_px=64)
    assert list(tmp_path.iterdir()) == []


def test_frames_replace_those_of_an_earlier_clip(tmp_path):
    write(tmp_path / "a.png", make_frames(9))
    killed = tmp_path / ".a.partial"
    killed.mkdir()
    (killed / "0007.png").write_bytes(b"half")
    write(tmp_path / "a.png", make_frames(3), metadata=METADATA)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "0000.png",
        "0001.png",
        "0002.png",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert read_metadata(tmp_path / "a") == METADATA


def put_foreign_frame(folder):
    Image.new("RGB", (8, 8)).save(folder / "0001.png")
    return "but 0001.png in it is none of an earlier clip"


def put_text(folder):
    (folder / "notes.txt").write_text("mine")
    return "but notes.txt in it is none of an earlier clip"


def put_damaged_frame(folder):
    (folder / "0009.png").write_text("mine")
    return "but 0009.png in it is none of an earlier clip"


@pytest.mark.parametrize("put", [put_foreign_frame, put_text, put_damaged_frame])
def test_a_folder_of_anything_else_is_not_replaced(tmp_path, put):
    path = tmp_path / "a.png"
    write(path, make_frames(2))
    why = put(tmp_path / "a")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    with pytest.raises(BadInput, match=f"a: frames would replace this folder, {why}; move it"):
        check_video_path(path)
    with pytest.raises(BadInput, match=why):
        write(path, make_frames(3))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before
    check_video_path(path, num_frames=1)
    write(path, make_frames(1))
    assert path.is_file()


def test_a_file_in_the_frames_way_is_not_replaced(tmp_path):
    (tmp_path / "a").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    for name in "ab":
        with pytest.raises(BadInput, match=f"/{name}: frames go to a folder of this name"):
            check_video_path(tmp_path / f"{name}.png")
    assert (tmp_path / "a").read_text() == "mine"


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    check_video_path(tmp_path / "new" / "A.MP4")
    assert list(tmp_path.iterdir()) == []
    names = r"--video takes an \.mp4, \.gif, \.webp or \.png file; write e\.g\. --video out\.mp4"
    for name in ("clip.avi", "clip", ".gif"):
        with pytest.raises(BadInput, match=rf"/{name}: {names}"):
            check_video_path(tmp_path / name, flag="--video")
        with pytest.raises(BadInput, match=rf"/{name}: an \.mp4, .* file was expected"):
            write(tmp_path / name, make_frames(1))
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(BadInput, match=r"folder\.gif: is a folder; .* with --out"):
        check_video_path(tmp_path / "folder.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/a\.gif: cannot be written"):
        check_video_path(tmp_path / "file" / "a.gif")
