"""What a folder yields under each option of the dataset file."""

import errno
import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from make_clips import write_image, write_video
from PIL import Image

from wan22_jax.data import probed, survey
from wan22_jax.data.buckets import BucketRule
from wan22_jax.data.captions import CaptionRule
from wan22_jax.data.companions import check_first_frame, read_mask
from wan22_jax.data.cuts import CutRule, choose_starts, name_cut, retime
from wan22_jax.data.probed import FACTS_FILE, Facts, read_stamp
from wan22_jax.data.survey import survey_folder, take_clips
from wan22_jax.data.video import MediaInfo, probe, read_clip
from wan22_jax.dataset import choose_uncond_fraction, read_directories
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket

SHAPES = "resolutions = [32]\nframe_buckets = [5]"


class Data:
    """A folder of clips and its dataset file."""

    def __init__(self, folder):
        self.folder = folder / "clips"
        self.folder.mkdir()
        self.toml = folder / "dataset.toml"
        self.notes = []

    def directories(self, own="", top=SHAPES, **more):
        self.toml.write_text(f"{top}\n[[directory]]\npath = '{self.folder}'\n{own}\n")
        return read_directories(self.toml, **more)

    def survey(self, *args, **more):
        (directory,) = self.directories(*args, **more)
        self.notes.clear()
        found = list(survey_folder(directory.folder, warn=self.notes.append))
        assert [outcome.file for outcome in found] == sorted(outcome.file for outcome in found)
        return {outcome.file: outcome for outcome in found}

    def clips(self, *args, **more):
        return [clip for found in self.survey(*args, **more).values() for clip in found.clips]

    def video(self, name, frames=12, caption="a clip", **options):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames, **options)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
        return path


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path)


def test_every_file_has_an_outcome(data):
    data.video("a.mp4")
    data.video("short.mp4", 4)
    data.video("untold.mp4", caption=None)
    (data.folder / "junk.mp4").write_bytes(b"junk")
    found = data.survey()
    assert {file: outcome.verdict for file, outcome in found.items()} == {
        "a.mp4": "used",
        "short.mp4": "dropped",
        "untold.mp4": "error",
        "junk.mp4": "error",
    }
    assert "too short: 4 frames" in found["short.mp4"].reason
    assert "caption missing" in found["untold.mp4"].reason
    assert found["junk.mp4"].info is None
    assert found["short.mp4"].info.frames == 4
    with pytest.raises(BadInput, match=r"3 of 4 files cannot be used: .*junk\.mp4.* \| .*short"):
        take_clips(data.folder, found.values(), allow_drop=False, warn=data.notes.append)
    del found["untold.mp4"], found["junk.mp4"]
    with pytest.raises(BadInput, match="too short"):
        take_clips(data.folder, found.values(), allow_drop=False, warn=data.notes.append)
    clips = take_clips(data.folder, found.values(), allow_drop=True, warn=data.notes.append)
    assert [clip.file for clip in clips] == ["a.mp4"]
    assert data.notes[-1].startswith("left out: ")
    assert "short.mp4: too short" in data.notes[-1]
    del found["a.mp4"]
    with pytest.raises(BadInput, match="nothing remains"):
        take_clips(data.folder, found.values(), allow_drop=True, warn=data.notes.append)


def test_skip_empty_caption_has_to_be_said(data):
    data.video("none.mp4", caption=None)
    data.video("empty.mp4", caption=" ")
    verdicts = {}
    for value in ("", "skip_empty_caption = true", "skip_empty_caption = false"):
        found = data.survey(value)
        verdicts[value[-5:]] = [
            (outcome.verdict, [clip.captions for clip in outcome.clips])
            for outcome in found.values()
        ]
    assert verdicts[""] == [("used", [("",)]), ("error", [])]
    assert verdicts[" true"] == [("skipped", []), ("skipped", [])]
    assert verdicts["false"] == [("used", [("",)]), ("used", [("",)])]


def test_captions_are_prefixed_shuffled_and_many(data):
    data.video("a.mp4")
    (data.folder / "captions.json").write_text(json.dumps({"a.mp4": ["x, y", "z"], "b.mp4": []}))
    (clip,) = data.clips("caption_prefix = 'P '")
    assert clip.captions == ("P x, y", "P z")
    assert any("left out b.mp4" in note for note in data.notes)
    assert len(data.clips("cache_shuffle_num = 3")[0].captions) == 6
    assert len(data.clips("shuffle_tags = true")[0].captions) == 2
    (clip,) = data.clips("cache_shuffle_num = 4\ncache_shuffle_delimiter = ' '")
    assert "y x," in clip.captions


def test_settings_of_a_directory_win_over_the_top(data):
    top = SHAPES + "\ncaption_prefix = 'TOP '\nrecursive = true\nskip_empty_caption = true"
    data.video("a.mp4")
    data.video("sub/b.mp4")
    assert [clip.captions for clip in data.clips(top=top)] == [("TOP a clip",)] * 2
    (clip,) = data.clips("caption_prefix = ''\nrecursive = false", top=top)
    assert clip.captions == ("a clip",)
    assert data.clips("min_ar = 1\nframe_buckets = [9]", top=top)[0].bucket == Bucket(32, 32, 9)


def test_several_resolutions_make_several_clips(data):
    data.video("a.mp4", size=(64, 48))
    clips = data.clips("resolutions = [32, 64]")
    assert [clip.bucket for clip in clips] == [Bucket(32, 32, 5), Bucket(64, 64, 5)]
    assert len({clip.digest for clip in clips}) == 1


def test_sub_folders(data):
    data.video("a.mp4")
    data.video("sub/deeper/b.mp4")
    data.video("cache/c.mp4")
    data.video(".hidden/d.mp4")
    data.video("sub/cache/wan2.2_5b/e.mp4", caption=None).with_suffix(".index").touch()
    data.video("elsewhere.mp4")
    (data.folder / "link").symlink_to(data.folder / "sub")
    assert list(data.survey()) == ["a.mp4", "elsewhere.mp4"]
    assert sum("sub-folders are not read" in note for note in data.notes) == 2
    found = data.survey("recursive = true")
    assert list(found) == ["a.mp4", "elsewhere.mp4", "sub/deeper/b.mp4"]
    assert data.notes == [f"{data.folder / 'link'}: left out, links to folders are not followed"]
    assert found["sub/deeper/b.mp4"].clips[0].captions == ("a clip",)


def test_a_folder_within_a_recursive_one_is_refused(data):
    data.video("sub/a.mp4")
    inner = f"[[directory]]\npath = '{data.folder}/sub'"
    assert len(data.directories(inner)) == 2
    with pytest.raises(BadInput, match="which is read with all its sub-folders"):
        data.directories(f"recursive = true\n{inner}")
    (data.folder / "loop").symlink_to("loop")  # has no place; the survey says that it is no folder
    assert len(data.directories(f"[[directory]]\npath = '{data.folder}/loop'")) == 2


@pytest.mark.parametrize(
    ("keys", "starts"),
    [
        ("", [0]),
        ("video_clip_mode = 'single_middle'", [12]),  # int((30 - 5) / 2)
        ("video_clip_mode = 'uniform'\nclips_per_video = 1", [0]),
        ("video_clip_mode = 'uniform'\nclips_per_video = 3", [0, 12, 25]),
        ("video_clip_mode = 'uniform'\nclips_per_video = 2\nframe_buckets = [29]", [0, 1]),
        ("video_clip_mode = 'uniform'\nclips_per_video = 9\nframe_buckets = [29]", [0, 1]),
    ],
)
def test_clip_modes(data, keys, starts):
    path = data.video("a.mp4", 30)
    write_image(data.folder / "b.png", (40, 40))
    (data.folder / "b.txt").write_text("a still")
    clips = data.clips(keys)
    assert [clip.start for clip in clips if clip.file == "a.mp4"] == starts
    assert [clip.start for clip in clips if clip.file == "b.png"] == [0]
    length = clips[0].bucket.frames
    whole_TYX3 = read_clip(path, probe(path), Bucket(32, 32, 30))
    for clip in clips[: len(starts)]:
        assert clip.cut == (f"start {clip.start}" if clip.start else "single_beginning")
        got_TYX3 = read_clip(path, clip.info, clip.bucket, start=clip.start)
        np.testing.assert_array_equal(got_TYX3, whole_TYX3[clip.start : clip.start + length])


def test_the_clip_mode_of_the_main_file_counts_unless_the_dataset_sets_one(data):
    data.video("a.mp4", 30)
    assert data.clips(clip_mode="single_middle")[0].start == 12
    own = "video_clip_mode = 'single_beginning'"
    assert data.clips(own, clip_mode="single_middle")[0].start == 0


def test_options_are_what_is_not_the_default():
    rule = BucketRule(())
    assert survey.Folder(Path("a"), rule).options == {}
    cuts, captions = CutRule("uniform", 3, Fraction(25, 2)), CaptionRule("x, ", skip_empty=False)
    folder = survey.Folder(Path("a"), rule, captions, cuts, recursive=True, mask_path=Path("m"))
    assert folder.options == {
        "video_clip_mode": "'uniform'",
        "clips_per_video": "'3'",
        "fps": "'25/2'",
        "caption_prefix": "'x, '",
        "skip_empty_caption": "'False'",
        "recursive": "'True'",
        "mask_path": "'m'",
    }


def test_fps_of_a_directory_replaces_that_of_its_files(data):
    path = data.video("a.mp4", 30, fps=30)
    write_image(data.folder / "b.png", (40, 40))
    (data.folder / "b.txt").write_text("a still")
    plain, still = data.clips("frame_buckets = [5, 21, 25, 29]")
    assert (plain.bucket.frames, plain.cut) == (21, "single_beginning")  # 24 at 24 fps
    slow, same_still = data.clips("fps = 24\nframe_buckets = [5, 21, 25, 29]")
    assert (slow.bucket.frames, slow.cut) == (29, "single_beginning fps 24")
    assert same_still == still
    frames_TYX3 = read_clip(path, slow.info, slow.bucket)
    every_TYX3 = read_clip(path, probe(path)._replace(fps=Fraction(24)), slow.bucket)
    np.testing.assert_array_equal(frames_TYX3, every_TYX3)
    assert data.clips("fps = 30\nframe_buckets = [5, 21]")[0].cut == "single_beginning"
    assert data.clips("fps = 29.97\nframe_buckets = [5]")[0].info.fps == Fraction(2997, 100)


def test_names_of_cuts_differ_where_frames_do():
    info = MediaInfo(64, 48, 30, Fraction(30), is_image=False)
    uneven = info._replace(is_uneven=True)
    names = {
        name_cut(start, retime(kind, CutRule(fps=fps)), fps_in_file=Fraction(30))
        for start in (0, 3)
        for kind in (info, uneven)
        for fps in (None, Fraction(24), Fraction(25))
    }
    assert len(names) == 8  # an uneven file is read by index once its rate is given
    assert choose_starts(info, 5, CutRule("single_middle")) == (9,)


def test_masks_are_found_checked_and_cropped_like_the_clip(data, tmp_path):
    masks = tmp_path / "masks"
    (masks / "sub").mkdir(parents=True)
    data.video("a.mp4", size=(96, 64))
    data.video("sub/b.mp4", size=(64, 96))
    left = np.zeros((64, 96, 3), np.uint8)
    left[:, :48] = 255, 0, 0  # red counts
    Image.fromarray(left).save(masks / "a.png")
    Image.new("RGBA", (64, 96), (128, 255, 255, 0)).save(
        masks / "sub" / "b.webp", lossless=True, exact=True
    )
    Image.new("L", (8, 8)).save(masks / "nobody.png")
    keys = f"recursive = true\nmask_path = '{masks}'"
    first, second = data.clips(keys)
    assert data.notes == [f"{masks / 'nobody.png'}: left out, no clip has this name"]
    assert (first.mask, second.mask) == (masks / "a.png", masks / "sub" / "b.webp")
    mask_YX = read_mask(first.mask, first.info, Bucket(96, 64, 5))
    assert mask_YX.dtype == np.float32
    np.testing.assert_array_equal(mask_YX, [[1, 1, 1, 0, 0, 0]] * 4)
    # cover 32 x 32: 48 x 32, so the middle third of the width is cut out: half of it is red
    np.testing.assert_array_equal(
        read_mask(first.mask, first.info, Bucket(32, 32, 5)), [[1, 0]] * 2
    )
    half = np.full((2, 2), np.float32(128) / 255)
    np.testing.assert_array_equal(read_mask(second.mask, second.info, Bucket(32, 32, 1)), half)

    (masks / "a.png").unlink()
    assert [clip.mask for clip in data.clips(keys)] == [None, second.mask]
    assert f"{masks}: has no mask for 1 of 2 files, such as a.mp4; the loss" in data.notes[-1]
    default = data.folder / "default.png"
    Image.new("L", (96, 64), 255).save(default)
    found = data.survey(f"{keys}\ndefault_mask_file = '{default}'")
    assert list(found) == ["a.mp4", "sub/b.mp4"]  # the mask is no clip
    assert found["a.mp4"].clips[0].mask == default
    Image.new("L", (64, 96), 255).save(default)
    found = data.survey(f"{keys}\ndefault_mask_file = '{default}'")
    assert found["a.mp4"].verdict == "error"
    assert "the mask has 64x96 pixels, its clip 96x64" in found["a.mp4"].reason


def test_a_mask_on_the_grid_is_nearest_exact(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 96), np.uint8)

    def nearest_exact(size_px, size):  # torch's formula
        return [int((i + 0.5) * size_px / size) for i in range(size)]

    rows, columns = nearest_exact(64, 4), nearest_exact(96, 6)
    expected = image[np.ix_(rows, columns)] / np.float32(255)
    path = tmp_path / "m.png"
    Image.fromarray(image).save(path)
    info = MediaInfo(96, 64, 1, Fraction(24), is_image=True)
    np.testing.assert_array_equal(read_mask(path, info, Bucket(96, 64, 1)), expected)


def test_a_given_first_frame_must_be_the_first_frame(data, tmp_path):
    firsts = tmp_path / "firsts"
    firsts.mkdir()
    path = data.video("a.mp4", 30, size=(96, 64), rotation=90)
    frame_YX3 = read_clip(path, probe(path), Bucket(64, 96, 1))[0]
    Image.fromarray(frame_YX3).resize((128, 192)).save(firsts / "a.jpg", quality=30)
    keys = f"first_frame_path = '{firsts}'"
    assert data.survey(keys)["a.mp4"].verdict == "used"
    other = frame_YX3.copy()
    other[30:70] = 200
    Image.fromarray(other).save(firsts / "a.jpg")
    outcome = data.survey(keys)["a.mp4"]
    assert outcome.verdict == "error"
    assert "does not show the first frame of a.mp4 (they differ by" in outcome.reason
    Image.fromarray(np.rot90(frame_YX3)).save(firsts / "a.jpg")
    assert "must have the clip's shape" in data.survey(keys)["a.mp4"].reason
    with pytest.raises(BadInput, match="first_frame_path needs video_clip_mode"):
        data.directories(f"{keys}\nvideo_clip_mode = 'single_middle'")


@pytest.mark.parametrize("crf", [18, 40])
def test_what_codecs_lose_of_a_first_frame_is_allowed(tmp_path, crf):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
    picture = small.resize((256, 192), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = 256, 192, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    check_first_frame(tmp_path / "a.png", tmp_path / "a.mp4", probe(tmp_path / "a.mp4"))
    Image.fromarray(np.roll(np.asarray(picture), 12, axis=1)).save(tmp_path / "b.png")
    with pytest.raises(BadInput, match="does not show the first frame"):
        check_first_frame(tmp_path / "b.png", tmp_path / "a.mp4", probe(tmp_path / "a.mp4"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("video_clip_mode = 'uniform'", "needs clips_per_video"),
        ("clips_per_video = 3", "clips_per_video needs video_clip_mode"),
        ("video_clip_mode = 'multiple_overlapping'", "key directory.0.video_clip_mode: "),
        ("default_mask_file = 'none.png'", "default_mask_file = 'none.png': no such file"),
        ("fps = 0", "key directory.0.fps: "),
        ("subsample_ratio = 0.5", "unknown key directory.0.subsample_ratio, did you mean subs"),
        ("cache_shuffle_delimiter = ''", "key directory.0.cache_shuffle_delimiter: "),
        ('mask_path = "a\\u0000b"', "mask_path holds a zero byte"),
    ],
)
def test_settings_that_cannot_be_met(data, keys, message):
    with pytest.raises(BadInput) as refusal:
        data.directories(keys)
    assert message in str(refusal.value)


def test_caption_dropout_of_the_dataset_file_wins(data):
    for top, expected in ((SHAPES, 0.25), (f"{SHAPES}\nuncond_fraction = 0", 0)):
        data.directories(top=top)
        assert choose_uncond_fraction(data.toml, in_main_file=0.25) == expected


def test_a_missing_mask_folder_is_named(data):
    data.video("a.mp4")
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        data.survey("mask_path = 'nowhere'")


@pytest.fixture
def counted(monkeypatch):
    """The files that were probed."""
    probed = []

    def probe_(path):
        probed.append(path.name)
        return probe(path)

    monkeypatch.setattr(survey, "probe", probe_)
    return probed


def test_a_second_survey_reads_no_media_file(data, counted, monkeypatch):
    data.video("a.mp4", 30, fps=30)
    write_image(data.folder / "b.png", (40, 40))
    (data.folder / "b.txt").write_text("a still")
    first = data.survey()
    assert sorted(counted) == ["a.mp4", "b.png"]
    with monkeypatch.context() as patch:
        patch.setattr(survey, "digest_file", None)
        assert data.survey() == first
    assert len(counted) == 2
    (data.folder / "a.txt").write_text("another caption")
    assert data.survey()["a.mp4"].clips[0].captions == ("another caption",)
    data.video("a.mp4", 31)
    assert data.survey()["a.mp4"].info.frames == 31
    assert sorted(counted) == ["a.mp4", "a.mp4", "b.png"]


def test_a_file_of_the_same_length_and_another_time_is_read_again(data, counted):
    path = data.video("a.mp4")
    data.survey()
    os.utime(path, ns=(0, 1))
    data.survey()
    assert counted == ["a.mp4"] * 2


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _junk(path):
    path.write_bytes(b"\xff\x00\n" * 100)


def _folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [_cut, _flip, _junk, _folder])
def test_damaged_facts_are_learnt_again(data, counted, spoil):
    for number in range(4):
        data.video(f"{number}.mp4")
    first = data.survey()
    spoil(data.folder / "cache" / "wan2.2_5b" / FACTS_FILE)
    assert data.survey() == first
    assert 4 < len(counted) <= 8
    assert data.survey() == first
    assert len(counted) <= 8 or spoil is _folder


def test_what_cannot_be_kept_is_learnt_all_the_same(data):
    data.video("a.mp4")
    (data.folder / "cache").write_text("not a folder")
    assert data.survey()["a.mp4"].verdict == "used"


def test_a_file_that_changes_under_the_reader_is_an_error(data, monkeypatch):
    path = data.video("a.mp4")

    def meddle(path_):
        info = probe(path_)
        with path_.open("ab") as file:
            file.write(b"more")
        return info

    monkeypatch.setattr(survey, "probe", meddle)
    outcome = data.survey()["a.mp4"]
    assert outcome.verdict == "error"
    assert outcome.reason == f"{path}: changed while it was read; run the same command again"


def test_facts_of_another_version_are_learnt_again(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("x")
    stamps = {path: read_stamp(path)}
    with monkeypatch.context() as patch:
        patch.setattr(probed, "_VERSION", 2)
        with Facts(tmp_path / "cache") as facts:
            facts.recall("a", stamps, lambda: "of tomorrow")
    with Facts(tmp_path / "cache") as facts:
        assert facts.recall("a", stamps, lambda: "of today") == "of today"


def test_two_runs_learn_side_by_side(tmp_path):
    path = tmp_path / "a"
    path.write_text("x")
    stamps = {path: read_stamp(path)}
    with Facts(tmp_path / "cache") as one, Facts(tmp_path / "cache") as other:
        for number in range(50):
            one.recall(f"one {number}", stamps, lambda n=number: n)
            other.recall(f"other {number}", stamps, lambda n=number: n)
    with Facts(tmp_path / "cache") as facts:
        for name in ("one", "other"):
            for number in range(50):
                assert facts.recall(f"{name} {number}", stamps, lambda: "forgotten") == number


def test_a_file_that_may_not_be_read_is_an_error(data, monkeypatch):
    path = data.video("a.mp4")

    def deny(path_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path_))

    monkeypatch.setattr(survey, "digest_file", deny)
    outcome = data.survey()["a.mp4"]
    assert outcome.verdict == "error"
    assert outcome.reason == f"{path}: cannot be read (Permission denied)"


def test_what_is_no_file_does_not_keep_the_reader_waiting(data):
    data.video("a.mp4")
    os.mkfifo(data.folder / "pipe.mp4")
    (data.folder / "gone.mp4").symlink_to("nowhere.mp4")
    (data.folder / "loop.mp4").symlink_to("loop.mp4")
    (data.folder / "masks").mkdir()
    found = data.survey(f"mask_path = '{data.folder / 'masks'}'")
    assert found["pipe.mp4"].reason.endswith("pipe.mp4: is not a file; remove it")
    assert found["gone.mp4"].reason.endswith("cannot be read (No such file or directory)")
    assert found["loop.mp4"].reason.endswith("cannot be read (Too many levels of symbolic links)")


def test_facts_do_not_pile_up(tmp_path):
    path = tmp_path / "a"
    for number in range(150):
        path.write_text("x" * number)
        with Facts(tmp_path / "cache") as facts:
            assert facts.recall("a", {path: read_stamp(path)}, lambda n=number: n) == number
    lines = (tmp_path / "cache" / FACTS_FILE).read_bytes().split(b"\n")
    assert len([line for line in lines if line]) < 110
    with Facts(tmp_path / "cache") as facts:
        assert facts.recall("a", {path: read_stamp(path)}, lambda: "forgotten") == 149
