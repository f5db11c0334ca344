"""``wan22-cache --dry-run`` on a messy folder; every count here was made by hand."""

import base64
import errno
import io
import json
import os
import re
from fractions import Fraction
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from make_clips import write_image, write_video
from PIL import Image

from wan22_jax import encode
from wan22_jax.data import preflight_page

SHAPES = """
resolutions = [64]
enable_ar_bucket = true
ar_buckets = [0.5, 1, 2]
frame_buckets = [9, 17]
"""
WIDE, SQUARE, TALL = "96x32", "64x64", "32x96"  # areas of 64 x 64 in steps of 32
NO_UTF8 = os.fsdecode(b"caf\xe9.png")

# file -> bucket, source fps, frames in the file, frames at 24 fps, frames kept
GOOD = {
    "h264.mp4": (f"{WIDE}x17", 24, 20, 20, 17),
    "hevc.mp4": (f"{TALL}x17", 30, 30, 24, 17),
    "vp9.webm": (f"{SQUARE}x9", 25, 15, 14, 9),
    "mpeg4.avi": (f"{SQUARE}x17", 12, 10, 20, 17),
    "mpeg2.ts": (f"{SQUARE}x9", 25, 12, 11, 9),
    "av1.mkv": (f"{SQUARE}x9", 24, 9, 9, 9),
    "ffv1.mkv": (f"{SQUARE}x9", 24, 9, 9, 9),
    "ten_bit.mp4": (f"{SQUARE}x17", 24, 17, 17, 17),
    "alpha.mov": (f"{SQUARE}x9", 24, 9, 9, 9),
    "odd.mp4": (f"{SQUARE}x9", 24, 10, 10, 9),  # 65 x 47: nearer to 1 than to 2
    "phone.mov": (f"{TALL}x9", 24, 9, 9, 9),  # 128 x 64, on its side
    "film.mp4": (f"{SQUARE}x17", 23.976, 17, 17, 17),
    "uneven.mkv": (f"{SQUARE}x17", 11.482, 12, 25, 17),  # 11 steps in 0.958 s
    "größe ☃ 猫.mp4": (f"{SQUARE}x17", 24, 17, 17, 17),
    "SHOUT.MP4": (f"{SQUARE}x9", 24, 9, 9, 9),
    "still.mp4": (f"{SQUARE}x1", 24, 1, 1, 1),
}
IMAGES = {
    "a <b> & c.png": f"{SQUARE}x1",
    NO_UTF8: f"{WIDE}x1",
    "upright.jpg": f"{TALL}x1",  # 64 x 32 with EXIF orientation 6
    "see-through.webp": f"{SQUARE}x1",
}
DROPPED = {
    "short.mp4": "too short: 8 frames at 24 fps, the shortest video bucket needs 9",
    "blink.mp4": "too short: 0 frames at 24 fps",
    "short_at_24.mp4": "too short: 8 frames at 24 fps",  # 10 at 30
}
BROKEN = {
    "audio.mp4": "has no video stream",
    "truncated.mp4": "is truncated",
    "headless.mp4": "does not decode as a video",
    "empty.mp4": "does not decode as a video",
    "prose.mp4": "does not decode as a video",
    "half.png": "does not decode as an image",
    "animated.webp": "is an animation",
    "deep.png": "has more than 8 bits of grey",
    "latin.mp4": "latin.txt: is not UTF-8",
    "untold.mp4": "untold.txt: caption missing",
}
NOTES = ["loop.gif", "README.md", "stray.txt", "more"]


def write_messy_folder(folder):
    def video(name, frames, size=(64, 64), **options):
        write_video(folder / name, frames, size=size, **options)

    video("h264.mp4", 20, (128, 64))
    video("hevc.mp4", 30, (64, 128), fps=30, codec="libx265")
    video("vp9.webm", 15, fps=25, codec="libvpx-vp9")
    video("mpeg4.avi", 10, (64, 48), fps=12, codec="mpeg4")
    video("mpeg2.ts", 12, fps=25, codec="mpeg2video")
    video("av1.mkv", 9, codec="libsvtav1")
    video("ffv1.mkv", 9, codec="ffv1", pix_fmt="yuv420p10le")
    video("ten_bit.mp4", 17, (128, 128), pix_fmt="yuv420p10le")
    video("alpha.mov", 9, codec="qtrle", pix_fmt="argb")
    video("odd.mp4", 10, (65, 47))
    video("phone.mov", 9, (128, 64), rotation=-90)
    video("film.mp4", 17, fps=Fraction(24000, 1001))
    video("uneven.mkv", 12, times=[0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 22, 23])
    video("größe ☃ 猫.mp4", 17)
    video("loud.mp4", 9)
    (folder / "loud.mp4").rename(folder / "SHOUT.MP4")
    video("still.mp4", 1)
    video("short.mp4", 8)
    video("blink.mp4", 1, fps=30)
    video("short_at_24.mp4", 10, fps=30)
    for name in ("latin.mp4", "untold.mp4", "headless.mp4"):
        video(name, 9)
    video("truncated.mp4", 60, (128, 96), options={"movflags": "faststart"})
    for name, share in (("truncated.mp4", 0.7), ("headless.mp4", 0.5)):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.rate = 48000
        container.mux([*stream.encode(silence), *stream.encode()])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "prose.mp4").write_text("this is no film\n" * 99)

    write_image(folder / "a <b> & c.png", (70, 64))
    write_image(folder / "plain.png", (96, 48))
    (folder / "plain.png").rename(folder / NO_UTF8)
    write_image(folder / "upright.jpg", (64, 32), orientation=6)
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(folder / "see-through.webp")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "half.png")
    content = (folder / "half.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    Image.new("I;16", (40, 40), 30000).save(folder / "deep.png")

    for file in [*GOOD, *IMAGES, *DROPPED, *BROKEN]:
        (folder / file).with_suffix(".txt").write_text("a caption", "utf-8")
    (folder / "latin.txt").write_bytes("größer".encode("latin-1"))
    (folder / "untold.txt").unlink()
    (folder / "loop.gif").write_bytes(b"GIF89a")
    (folder / "README.md").write_text("what this is")
    (folder / "stray.txt").write_text("no clip")
    (folder / "more").mkdir()
    write_image(folder / "more" / "deeper.png", (32, 32))
    (folder / ".hidden.mp4").write_text("nobody sees it")


class Run:
    """A dry run: exit code, what it printed, what it wrote."""

    def __init__(self, place, clips, keys="", *, main="", arguments=()):
        place.mkdir(exist_ok=True)
        self.out = place / "out"
        config, dataset = place / "main.toml", place / "dataset.toml"
        config.write_text(
            f"output_dir = '{self.out}'\ndataset = '{dataset}'\nepochs = 1\n{main}\n"
            "[model]\nckpt_path = 'not needed'\n[adapter]\ntype = 'lora'\n"
        )
        dataset.write_text(f"{SHAPES}\n{keys}\n[[directory]]\npath = '{clips}'\n")
        self.code = encode.main(["--config", str(config), "--dry-run", *arguments])
        written = self.out / "preflight.json"
        self.report = json.loads(written.read_text()) if written.is_file() else None
        page = self.out / "preflight.html"
        self.page = page.read_text("utf-8") if page.is_file() else None
        assert not list(place.rglob("*.partial"))

    @property
    def files(self):
        return {os.path.basename(row["path"]): row for row in self.report["files"]}


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("messy")
    write_messy_folder(folder)
    return folder


@pytest.fixture
def sound(messy, tmp_path):
    """The messy folder without what is broken."""
    folder = tmp_path / "sound"
    folder.mkdir()
    for file in [*GOOD, *IMAGES, *DROPPED]:
        for path in ((messy / file), (messy / file).with_suffix(".txt")):
            os.link(path, folder / path.name)
    return folder


def test_every_file_of_a_messy_folder_is_accounted_for(messy, tmp_path, capsys):
    run = Run(tmp_path / "run", messy)
    assert run.code == 2
    files = run.files
    assert set(files) == {*GOOD, *IMAGES, *DROPPED, *BROKEN}
    for file, (bucket, fps, frames, at_24, kept) in GOOD.items():
        row = files[file]
        assert row["verdict"] == "used", row
        got = (row["fps"], row["frames"], row["frames_out"], row["frames_kept"])
        assert got == (fps, frames, at_24, kept), file
        assert row["clips"] == [{"bucket": bucket, "start": 0}], file
        assert row["uneven"] == (file == "uneven.mkv"), file
    for file, bucket in IMAGES.items():
        assert files[file]["verdict"] == "used"
        assert files[file]["clips"] == [{"bucket": bucket, "start": 0}], file
    for expected, verdict in ((DROPPED, "dropped"), (BROKEN, "error")):
        for file, reason in expected.items():
            assert files[file]["verdict"] == verdict, file
            assert reason in files[file]["reason"], file
            assert "clips" not in files[file]
    assert [note.split(":")[0].rpartition("/")[2] for note in run.report["notes"]] == [
        "README.md", "loop.gif", "stray.txt", "more"
    ]  # fmt: skip
    assert run.report["totals"] == {
        "files": {"used": 20, "skipped": 0, "dropped": 3, "error": 10},
        "clips": 20,
        "clips_never_trained": 0,
        "steps_per_epoch": 20,
        "steps_left_out_by_subsample_ratio": 0,
        # 64x64: 3 stills of 4, 7 clips of 12, 5 of 20; 96x32: one of 3, one of 15; 32x96: 3, 9, 15
        "tokens_per_epoch": 3 * 4 + 7 * 12 + 5 * 20 + 3 + 15 + 3 + 9 + 15,
        "bytes": 4 * 48 * 2 * (3 * 4 + 7 * 12 + 5 * 20 + 3 + 15 + 3 + 9 + 15),
    }
    captured = capsys.readouterr()
    printed = captured.out.splitlines()
    assert sum(line.startswith("   used") for line in printed) == 20
    assert any("hevc.mp4: 64x128, 30 frames at 30 fps -> 24 at 24, 17 kept" in x for x in printed)
    assert any(line.startswith("  error  ") and "audio.mp4" in line for line in printed)
    assert "files: 20 used, 0 skipped, 3 dropped, 10 error" in printed


def test_what_is_cached_is_what_was_foretold(sound, tmp_path):
    """The real run takes the same files to the same buckets, decoding each."""
    from wan22_jax.data.survey import survey_folder, take_clips
    from wan22_jax.data.video import read_clip
    from wan22_jax.dataset import read_directories

    run = Run(tmp_path / "run", sound, arguments=["--allow-drop"])
    assert run.code == 0
    (directory,) = read_directories(tmp_path / "run" / "dataset.toml")
    outcomes = survey_folder(directory.folder, warn=lambda _: None)
    clips = take_clips(directory.path, outcomes, allow_drop=True, warn=lambda _: None)
    assert {clip.file: str(clip.bucket) for clip in clips} == {
        **{file: expected[0] for file, expected in GOOD.items()},
        **IMAGES,
    }
    for clip in clips:
        pixels_TYX3 = read_clip(clip.path, clip.info, clip.bucket, start=clip.start)
        frames, height, width = clip.bucket.frames, clip.bucket.height_px, clip.bucket.width_px
        assert pixels_TYX3.shape == (frames, height, width, 3)


def test_exit_codes(sound, tmp_path, capsys):
    assert Run(tmp_path / "lost", sound).code == 1
    assert Run(tmp_path / "allowed", sound, arguments=["--allow-drop"]).code == 0
    for file in DROPPED:
        (sound / file).unlink()
    assert Run(tmp_path / "whole", sound).code == 0
    never = Run(tmp_path / "never", sound, main="micro_batch_size_per_gpu = 2")
    assert never.code == 1  # four buckets have a single clip
    assert "never trained" in capsys.readouterr().out
    assert Run(tmp_path / "none", tmp_path / "nowhere").code == 2
    assert "no such folder" in capsys.readouterr().err
    few = "subsample_ratio = 0.01"
    assert Run(tmp_path / "no step", sound, few).code == 2
    assert "an epoch has no step" in capsys.readouterr().out
    assert Run(tmp_path / "no step", sound, few, arguments=["--allow-drop"]).code == 2
    (sound / "h264.txt").unlink()
    skipped = Run(tmp_path / "skipped", sound, "skip_empty_caption = true")
    assert skipped.code == 0
    assert skipped.files["h264.mp4"]["verdict"] == "skipped"
    assert Run(tmp_path / "silent", sound, "skip_empty_caption = false").code == 0
    assert Run(tmp_path / "error", sound).code == 2


def test_steps_are_counted_as_the_loader_counts_them(sound, tmp_path):
    keys = "num_repeats = 2.5\nskip_empty_caption = true\nsubsample_ratio = 0.5"
    (sound / "captions.json").write_text(
        json.dumps({"h264.mp4": ["a", "b", "c"], "hevc.mp4": ["a"], "vp9.webm": ["a", "b"]})
    )
    main = "micro_batch_size_per_gpu = 1\ngradient_accumulation_steps = 2"
    run = Run(tmp_path / "run", sound, keys, main=main, arguments=["--allow-drop"])
    counts = {
        row["bucket"]: (row["clips"], row["entries"], row["steps"], row["left_out_each_epoch"])
        for row in run.report["buckets"]
    }
    assert counts == {
        "96x32x17": (1, 7, 3, 1),  # three captions, 2.5 times
        "32x96x17": (1, 2, 1, 0),
        "64x64x9": (1, 5, 2, 1),
    }
    assert run.report["totals"]["steps_per_epoch"] == 3
    assert run.report["totals"]["steps_left_out_by_subsample_ratio"] == 3
    tokens = 2 * (3 * 3 * 5 + 1 * 3 * 5 + 2 * 4 * 3)  # of all six steps
    assert run.report["totals"]["tokens_per_epoch"] == tokens // 2
    assert run.report["totals"]["files"]["skipped"] == 17


def test_a_retimed_folder_and_several_clips_a_file(sound, tmp_path):
    keys = "video_clip_mode = 'uniform'\nclips_per_video = 2"
    run = Run(tmp_path / "run", sound, keys, arguments=["--allow-drop"])
    assert run.files["hevc.mp4"]["clips"] == [
        {"bucket": f"{TALL}x17", "start": 0},
        {"bucket": f"{TALL}x17", "start": 7},
    ]
    assert run.files["hevc.mp4"]["frames_kept"] == 24
    dataset = tmp_path / "run" / "dataset.toml"
    dataset.write_text(f"{dataset.read_text()}fps = 30\n")
    assert encode.main(["--config", str(tmp_path / "run" / "main.toml"), "--dry-run"]) == 1
    rows = json.loads((tmp_path / "run" / "out" / "preflight.json").read_text())["files"]
    (film,) = (row for row in rows if row["path"].endswith("film.mp4"))
    assert (film["fps"], film["read_as_fps"], film["frames_out"]) == (23.976, 30, 13)


class Reader(HTMLParser):
    """Collects what a page shows and what it would fetch."""

    def __init__(self, page):
        super().__init__()
        self.links, self.rows, self.words = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("src", "href") if name in found]
        if tag == "tr":
            self.rows.append([])
        assert tag not in {"script", "link", "iframe", "b"} or found == {}

    def handle_data(self, data):
        self.words.append(data)
        if self.rows:
            self.rows[-1].append(data)


def test_the_page_needs_nothing_else_and_shows_everything(messy, tmp_path):
    run = Run(tmp_path / "run", messy)
    page = Reader(run.page)
    pictured = 0
    for link in page.links:
        kind, _, content = link.partition(",")
        assert kind == "data:image/jpeg;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        assert max(picture.size) == preflight_page.THUMBNAIL_PX
        pictured += 1
    # Of what is read: all but the broken, and 'blink' and the two with bad captions
    assert pictured == len(GOOD) + len(IMAGES) + 2 + 2
    assert not re.search(r"url\(|@import|https?:", run.page)
    words = "".join(page.words)
    for file in [*GOOD, *DROPPED, *BROKEN, "a <b> & c.png", "caf?.png", *NOTES]:
        assert file in words, file
    rows = [" ".join(row) for row in page.rows]
    assert run.page.count('<span class="used">') == 20
    assert any("hevc.mp4" in row and "30 at 30 fps" in row and "24 17" in row for row in rows)
    assert any("short.mp4" in row and "needs 9" in row for row in rows)


def test_a_long_page_ends(messy, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_page, "ROWS_PER_VERDICT", 3)
    monkeypatch.setattr(preflight_page, "THUMBNAILS", 1)
    page = Reader(Run(tmp_path / "run", messy).page)
    words = "".join(page.words)
    assert "and 17 more" in words
    assert "Files used: 20" in words
    assert 3 <= len(page.links) <= 8


def test_a_full_disk_leaves_no_half_report(sound, tmp_path, monkeypatch, capsys):
    def fill_disk(*_args, **_keys):
        raise OSError(errno.ENOSPC, "No space left on device", "preflight.html")

    monkeypatch.setattr(preflight_page.Page, "write", fill_disk)
    run = Run(tmp_path / "run", sound, arguments=["--allow-drop"])
    assert run.code == 2
    assert "the disk is full while writing preflight.html" in capsys.readouterr().err
    assert [path.name for path in run.out.iterdir()] == ["preflight.json"]


def test_a_second_dry_run_probes_nothing(sound, tmp_path, monkeypatch):
    first = Run(tmp_path / "first", sound)
    monkeypatch.setattr("wan22_jax.data.survey.probe", None)
    monkeypatch.setattr("wan22_jax.data.survey.digest_file", None)
    assert Run(tmp_path / "second", sound).report == first.report


def test_reports_that_cannot_be_written_are_refused(sound, tmp_path, capsys):
    run = Run(tmp_path / "run", sound, arguments=["output_dir=/proc/x"])
    assert (run.code, run.report) == (2, None)
    assert "error: /proc/x: cannot be written (" in capsys.readouterr().err
