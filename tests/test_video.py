import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from make_clips import grey_of, read_grey, write_image, write_video
from PIL import Image, ImageOps

from wan22_jax.data import video
from wan22_jax.data.video import probe, read_clip, resample_indices
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket


def test_indices_equal_diffusion_pipes():
    at_30 = resample_indices(100, Fraction(30)).tolist()
    assert len(at_30) == 80
    assert at_30[:6] == [0, 1, 2, 3, 5, 6]
    assert at_30[-3:] == [96, 97, 99]
    at_16 = resample_indices(49, Fraction(16)).tolist()
    assert len(at_16) == 73
    assert at_16[:6] == [0, 0, 1, 2, 2, 3]
    assert resample_indices(7, Fraction(24)).tolist() == list(range(7))
    assert resample_indices(1, Fraction(24)).tolist() == [0]
    assert resample_indices(1, Fraction(30)).tolist() == []


@pytest.mark.parity
def test_indices_equal_torch_where_rounding_decides():
    torch = pytest.importorskip("torch")
    decided = 0
    for frames in range(2, 400):
        for fps in (10, 12, 15, 16, 25, 30, 48, 50, 60, 120):
            count = int(frames * 24 / fps)
            if count < 1:
                continue
            expected = torch.linspace(0, frames - 1, count).int().numpy()
            np.testing.assert_array_equal(resample_indices(frames, Fraction(fps)), expected)
            exact = np.arange(count) * (frames - 1) // max(count - 1, 1)
            decided += not np.array_equal(expected, exact)
    assert decided  # exact arithmetic would not do


def test_thirty_fps_clip_yields_the_frames_of_the_grid(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, 50, fps=30)
    info = probe(path)
    assert info[:3] == (64, 48, 50)
    assert (info.fps, info.frames_24, info.is_image) == (30, 40, False)
    clip_TYX3 = read_clip(path, info, Bucket(64, 32, 33))
    assert clip_TYX3.shape == (33, 32, 64, 3)
    expected = [grey_of(index) for index in resample_indices(50, Fraction(30))[:33]]
    assert np.abs(np.subtract(read_grey(clip_TYX3), expected)).max() <= 1
    assert expected != [grey_of(index) for index in range(33)]


def test_slow_clip_repeats_frames(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, 12, fps=12)
    clip_TYX3 = read_clip(path, probe(path), Bucket(64, 32, 21))
    expected = [grey_of(index) for index in resample_indices(12, Fraction(12))[:21]]
    assert np.abs(np.subtract(read_grey(clip_TYX3), expected)).max() <= 1
    assert len(set(expected)) < 21


def test_frames_of_uneven_times_are_chosen_by_time(tmp_path):
    path = tmp_path / "a.mkv"
    shown_at = [0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 22, 23]  # in 24ths of a second: a long pause
    write_video(path, 12, times=shown_at, codec="ffv1")
    info = probe(path)
    assert info.is_uneven
    assert info.frames == 12
    assert info.frames_24 == 25  # 23/24 s between first and last, and the mean step
    clip_TYX3 = read_clip(path, info, Bucket(64, 32, 21))
    expected = [grey_of(max(i for i in range(12) if shown_at[i] <= k)) for k in range(21)]
    assert np.abs(np.subtract(read_grey(clip_TYX3), expected)).max() <= 1
    later_TYX3 = read_clip(path, info, Bucket(64, 32, 5), start=16)
    np.testing.assert_array_equal(later_TYX3, clip_TYX3[16:])
    by_index = read_clip(path, info._replace(is_uneven=False), Bucket(64, 32, 21))
    assert read_grey(by_index) != read_grey(clip_TYX3)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mp4", "libx265")],
)
@pytest.mark.parametrize("fps", [24, 30])
def test_a_later_clip_equals_the_frames_decoded_from_the_beginning(
    tmp_path, monkeypatch, name, codec, fps
):
    path = tmp_path / name
    write_video(path, 100, fps=fps, codec=codec, gop=12)
    info = probe(path)
    assert not info.is_uneven
    whole_TYX3 = read_clip(path, info, Bucket(64, 32, info.frames_24 // 4 * 4 - 3))
    monkeypatch.delattr(video, "_decode_all")  # it seeks, it does not start again
    for start in (1, 30, len(whole_TYX3) - 9):
        clip_TYX3 = read_clip(path, info, Bucket(64, 32, 9), start=start)
        np.testing.assert_array_equal(clip_TYX3, whole_TYX3[start : start + 9])


@pytest.mark.parametrize("suffix", ["mkv", "webm", "avi", "ts"])
def test_containers_that_promise_no_frame_count(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(suffix, "libx264")
    write_video(path, 10, codec=codec)
    assert probe(path)[:4] == (64, 48, 10, 24)
    assert read_clip(path, probe(path), Bucket(64, 32, 9)).shape == (9, 32, 64, 3)


def test_frames_outside_the_edit_list_do_not_count(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, 60)
    data = bytearray(path.read_bytes())
    field = data.index(b"elst") + 12  # duration of the only edit, as a phone's trim sets it
    (duration,) = struct.unpack_from(">I", data, field)
    struct.pack_into(">I", data, field, duration // 2)
    path.write_bytes(data)
    info = probe(path)
    assert info.frames == 30
    clip_TYX3 = read_clip(path, info, Bucket(64, 32, 29))
    assert clip_TYX3.shape[0] == 29
    later_TYX3 = read_clip(path, info, Bucket(64, 32, 5), start=24)
    np.testing.assert_array_equal(later_TYX3, clip_TYX3[24:])


def test_where_seeking_fails_decoding_starts_again(tmp_path, monkeypatch):
    path = tmp_path / "a.mkv"
    write_video(path, 60, gop=10)
    info = probe(path)
    expected_TYX3 = read_clip(path, info, Bucket(64, 32, 9), start=33)
    seconds, wrong = video._seconds, iter([7.0])
    # As after a seek into an open group of pictures: a frame whose time is not that of any.
    monkeypatch.setattr(video, "_seconds", lambda pts, stream: next(wrong, seconds(pts, stream)))
    again_TYX3 = read_clip(path, info, Bucket(64, 32, 9), start=33)
    assert next(wrong, None) is None
    np.testing.assert_array_equal(again_TYX3, expected_TYX3)


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.rate = 48000
        container.mux([*sound.encode(silence), *sound.encode()])
        picture = av.VideoFrame.from_image(Image.new("RGB", (32, 32)))
        container.mux([*cover.encode(picture), *cover.encode()])
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(BadInput, match="has no video stream"):
        probe(path)


def test_crop_is_cover_centre_bicubic(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (50, 101, 3), np.uint8))
    image.save(tmp_path / "a.png")
    info = probe(tmp_path / "a.png")
    clip_TYX3 = read_clip(tmp_path / "a.png", info, Bucket(64, 64, 1))
    # cover: 50 rows become 64, so of the 101 columns the middle 50 remain
    middle = image.resize((64, 64), Image.Resampling.BICUBIC, box=(25.5, 0, 75.5, 50))
    np.testing.assert_array_equal(clip_TYX3[0], middle)
    squeezed = image.resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(clip_TYX3[0] - np.asarray(squeezed, int)).mean() > 10


def test_odd_sizes(tmp_path):
    write_video(tmp_path / "a.mp4", 3, size=(65, 47))
    info = probe(tmp_path / "a.mp4")
    assert info[:3] == (65, 47, 3)
    assert read_clip(tmp_path / "a.mp4", info, Bucket(32, 32, 1)).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_of_a_video_counts(tmp_path, rotation):
    path = tmp_path / "a.mp4"
    write_video(path, 3, rotation=rotation)
    info = probe(path)
    quarter = abs(rotation) == 90
    assert info[:2] == ((48, 64) if quarter else (64, 48))
    bucket = Bucket(96, 128, 1) if quarter else Bucket(128, 96, 1)
    frame_YX3 = read_clip(path, info, bucket)[0].astype(int)
    # The white corner, top left as coded: 90 degrees counterclockwise takes it to the bottom left.
    corners = {90: (-1, 0), -90: (0, -1), 180: (-1, -1)}
    white = {
        corner for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if frame_YX3[corner][0] > 200
    }
    assert white == {corners[rotation]}


def test_orientation_of_an_image_counts(tmp_path):
    write_image(tmp_path / "a.jpg", (64, 32), orientation=6)
    assert probe(tmp_path / "a.jpg")[:2] == (32, 64)


def test_alpha_lies_on_white(tmp_path):
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "a.png")
    clip_TYX3 = read_clip(tmp_path / "a.png", probe(tmp_path / "a.png"), Bucket(32, 32, 1))
    assert (clip_TYX3 == 255).all()


def test_grey_and_palette_images_become_rgb(tmp_path):
    Image.new("L", (40, 40), 7).save(tmp_path / "a.png")
    ImageOps.invert(Image.new("L", (40, 40), 7)).convert("P").save(tmp_path / "b.png")
    for name, value in (("a.png", 7), ("b.png", 248)):
        path = tmp_path / name
        assert (read_clip(path, probe(path), Bucket(32, 32, 1)) == value).all()


def test_photo_with_a_second_view_is_its_first(tmp_path):
    first, second = Image.new("RGB", (40, 40), "white"), Image.new("RGB", (40, 40), "black")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    info = probe(tmp_path / "a.jpg")
    assert (read_clip(tmp_path / "a.jpg", info, Bucket(32, 32, 1)) == 255).all()


def test_sixteen_bits_of_grey_are_refused(tmp_path):
    Image.new("I;16", (40, 40), 30000).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="8 bits"):
        probe(tmp_path / "a.png")


def _junk(path):
    path.write_bytes(b"not a film" * 100)


def _no_index(path):
    write_video(path, 20)
    path.write_bytes(path.read_bytes()[:-400])


def _cut_off(path):
    write_video(path, 60, options={"movflags": "faststart"}, size=(128, 96))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [_junk, _no_index, _cut_off, _empty])
@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_broken_file_is_named_by_the_probe(tmp_path, spoil, name):
    video = tmp_path / "a.mp4"
    spoil(video)
    path = tmp_path / name
    if path != video:
        path.write_bytes(video.read_bytes())
    with pytest.raises(BadInput, match=r"(re-encode|copy it again|replace) .*"):
        probe(path)


def test_truncated_image_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match=r"a\.png"):
        probe(tmp_path / "a.png")


def test_animated_webp_is_refused(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(BadInput, match="animation"):
        probe(tmp_path / "a.webp")


def test_damage_inside_a_video_is_refused_when_read(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, 30, size=(128, 96))
    info = probe(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1500] = bytes(1500)
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"a\.mp4"):
        read_clip(path, info, Bucket(128, 96, 29))


def test_fewer_frames_than_counted(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, 30)
    info = probe(path)._replace(frames=40)
    # 30 frames at 24 fps do not change, so a bucket that they fill gets them all ...
    assert read_clip(path, info._replace(fps=info.fps), Bucket(64, 32, 29)).shape[0] == 29
    with pytest.raises(BadInput, match=r"30 frames decode, 30 at 24 fps; bucket 64x32x33"):
        read_clip(path, info, Bucket(64, 32, 33))


def test_a_large_photo_is_no_reason_to_warn(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    code = (
        "import sys; from wan22_jax.data.video import *; print(probe(Path(sys.argv[1])).width_px)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.png")], capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (b"10000\n", b"")
