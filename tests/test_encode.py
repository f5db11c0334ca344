import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_preflight as messy
from make_clips import write_image, write_video
from PIL import Image

from convert.weights import main as convert
from wan22_jax import clip_encoder, encode, text
from wan22_jax.data.batching import make_batching
from wan22_jax.data.cache import make_text_key, name_encoders
from wan22_jax.data.cache_writer import open_writer
from wan22_jax.data.loader import make_loader
from wan22_jax.data.video import probe, read_clip
from wan22_jax.dataset import open_caches
from wan22_jax.demo_checkpoint import TINY_VAE, write_checkpoint
from wan22_jax.geometry import Bucket
from wan22_jax.model_folder import load_text_encoder, load_vae, read_model_card, tokenizer_folder
from wan22_jax.text import encode_text, load_tokenizer

BUCKET = Bucket(32, 32, 5)
VAE = dataclasses.replace(TINY_VAE, num_res_blocks=1)
CAPTIONS = {"a": "a grey square", "b": "ein graues Quadrat — größer", "c": "a still"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two converted models that differ in their weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        convert_model(folder, seed=seed)
    return folder


def convert_model(folder, *, seed):
    official = folder / f"official{seed}"
    write_checkpoint(official, captions=CAPTIONS.values(), vae=VAE, seed=seed)
    out = str(folder / f"model{seed}")
    assert convert(["--ckpt_path", str(official), "--out", out, "--dtype", "float32"]) == 0


class Place:
    """A data set, its config files and the command."""

    def __init__(self, folder, models):
        self.clips = folder / "clips"
        self.clips.mkdir()
        self.model = models / "model0"
        self.config = folder / "main.toml"
        self.dataset = folder / "dataset.toml"
        self.config.write_text(
            f"output_dir = 'out'\ndataset = '{self.dataset}'\nepochs = 1\n"
            f"[model]\nckpt_path = '{self.model}'\nvae_dtype = 'float32'\n"
            "[adapter]\ntype = 'lora'\n"
        )
        self.write_dataset("resolutions = [32]\nframe_buckets = [5]")

    def write_dataset(self, keys):
        self.dataset.write_text(f"{keys}\n[[directory]]\npath = '{self.clips}'\n")

    def fill(self):
        write_video(self.clips / "a.mp4", 12, size=(96, 64))
        write_video(self.clips / "b.mp4", 20, fps=30, size=(64, 80), seed=40)
        write_image(self.clips / "c.png", (70, 64))
        for stem, caption in CAPTIONS.items():
            (self.clips / f"{stem}.txt").write_text(f"{caption}\n", encoding="utf-8")

    def run(self, *arguments):
        # Each device compiles for itself here: see test_devices.py for several.
        return encode.main(["--config", str(self.config), "--devices=1", *arguments])

    def encoders(self):
        return name_encoders(read_model_card(self.model).digests, vae_dtype="float32")

    def open(self):
        return open_caches(self.dataset, encoders=self.encoders())

    def stored(self):
        ((cache, _),) = self.open()
        return {
            clip.file: (clip.bucket, cache.read(number)) for number, clip in enumerate(cache.clips)
        }


@pytest.fixture
def place(tmp_path, models):
    return Place(tmp_path, models)


@pytest.fixture
def counted(monkeypatch):
    """What was encoded: number of captions and of clips."""
    count = SimpleNamespace(captions=0, clips=0)

    def encode_text_(encoder, tokenizer, prompts):
        count.captions += sum(prompt != "" for prompt in prompts)
        return encode_text(encoder, tokenizer, prompts)

    start_encoding = clip_encoder.start_encoding

    def start_encoding_(vae, pixels_TYX3):
        count.clips += 1
        return start_encoding(vae, pixels_TYX3)

    monkeypatch.setattr(text, "encode_text", encode_text_)
    monkeypatch.setattr(clip_encoder, "start_encoding", start_encoding_)
    return count


def test_evaluation_sets_are_cached_too(place, counted, tmp_path, capsys):
    place.fill()
    held_out, file = tmp_path / "held_out", tmp_path / "eval.toml"
    held_out.mkdir()
    write_image(held_out / "d.png", (64, 64))
    (held_out / "d.txt").write_text(CAPTIONS["c"])
    file.write_text(f"resolutions = [32]\n[[directory]]\npath = '{held_out}'\n")
    # The training set serves as an evaluation set as well: its one cache is made once.
    sets = f"eval_datasets=['{file}', {{name='train_set', config='{place.dataset}'}}]"
    assert place.run(sets) == 0
    assert (counted.captions, counted.clips) == (4, 4)
    ((cache, _),) = open_caches(file, encoders=place.encoders())
    assert cache.clips.file(0) == "d.png"
    assert cache.read(0).latents_TYXC.any()
    assert place.run(sets) == 0
    assert (counted.captions, counted.clips) == (4, 4)
    capsys.readouterr()
    assert place.run("--verify", sets) == 0
    assert capsys.readouterr().out.count("held_out") == 1
    keys = f"resolutions = [64]\n[[directory]]\npath = '{place.clips}'\n"
    file.write_text(keys)
    assert place.run(sets) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"eval.toml: {place.clips} is also a folder of {place.dataset}, with other" in error


def test_folder_to_cache_to_batch(place, capsys):
    place.fill()
    assert place.run() == 0
    stored = place.stored()
    assert {file: bucket for file, (bucket, _) in stored.items()} == {
        "a.mp4": BUCKET,
        "b.mp4": BUCKET,
        "c.png": BUCKET._replace(frames=1),
    }
    vae, encoder = load_vae(place.model), load_text_encoder(place.model)
    tokenizer = load_tokenizer(tokenizer_folder(place.model))
    for file, (bucket, (latents_TYXC, text_SE, _)) in stored.items():
        path = place.clips / file
        pixels_TYX3 = read_clip(path, probe(path), bucket)
        video_1TYX3 = jnp.asarray(pixels_TYX3[None]).astype(jnp.float32) / 127.5 - 1
        (whole_1TYXC,) = vae.encode_chunks([video_1TYX3])
        assert latents_TYXC.dtype == text_SE.dtype == ml_dtypes.bfloat16
        rounding = {"rtol": 2**-8, "atol": 2e-5}
        np.testing.assert_allclose(latents_TYXC.astype(np.float32), whole_1TYXC[0], **rounding)
        (expected_SE,) = encode_text(encoder, tokenizer, [CAPTIONS[path.stem]])
        np.testing.assert_allclose(text_SE.astype(np.float32), expected_SE, **rounding)
    loader = make_loader(place.open(), seed=0, batching=make_batching(2, 2))
    assert loader.steps_per_epoch == 1
    assert set(loader[0].clips) == {"a.mp4", "b.mp4"}
    table = capsys.readouterr().out
    assert "32x32x5       2" in table
    assert str(place.clips / "cache" / "wan2.2_5b") in table


def test_only_what_changed_is_encoded(place, counted):
    place.fill()
    assert place.run() == 0
    assert (counted.captions, counted.clips) == (3, 3)
    assert place.run() == 0
    assert (counted.captions, counted.clips) == (3, 3)

    before = place.stored()
    (place.clips / "a.txt").write_text("another caption")
    assert place.run() == 0
    assert (counted.captions, counted.clips) == (4, 3)
    after = place.stored()
    np.testing.assert_array_equal(after["a.mp4"][1].latents_TYXC, before["a.mp4"][1].latents_TYXC)
    assert after["a.mp4"][1].text_SE.tolist() != before["a.mp4"][1].text_SE.tolist()

    write_video(place.clips / "a.mp4", 12, size=(96, 64), seed=90)  # other pixels, same name
    assert place.run() == 0
    assert (counted.captions, counted.clips) == (4, 4)
    changed = place.stored()["a.mp4"][1].latents_TYXC
    assert changed.tolist() != before["a.mp4"][1].latents_TYXC.tolist()

    (place.clips / "b.mp4").rename(place.clips / "d.mp4")
    (place.clips / "b.txt").rename(place.clips / "d.txt")
    assert place.run() == 0
    assert (counted.captions, counted.clips) == (4, 4)
    assert set(place.stored()) == {"a.mp4", "c.png", "d.mp4"}

    place.write_dataset("resolutions = [64, 32]\nframe_buckets = [5]")
    assert place.run() == 0
    assert (counted.captions, counted.clips) == (4, 7)

    assert place.run("--regenerate_cache") == 0
    assert (counted.captions, counted.clips) == (7, 13)


def test_clips_and_captions_of_one_file_are_encoded_one_by_one(place, counted):
    place.fill()
    captions = {"a.mp4": ["one, two, three", "other"], "b.mp4": ["b"], "c.png": ["c"]}
    (place.clips / "captions.json").write_text(json.dumps(captions))
    keys = "resolutions = [32]\nframe_buckets = [5]\ncaption_prefix = 'P '\nuncond_fraction = 0.1"
    place.write_dataset(keys + "\nvideo_clip_mode = 'uniform'\nclips_per_video = 3")
    assert place.run() == 0
    # 12 and 16 frames at 24 fps: three starts each
    assert counted.clips == 3 + 3 + 1
    assert counted.captions == 4
    ((cache, _),) = place.open()
    assert [(clip.file, clip.start) for clip in cache.clips] == [
        *(("a.mp4", start) for start in (0, 3, 7)),
        *(("b.mp4", start) for start in (0, 5, 11)),
        ("c.png", 0),
    ]
    assert cache.clips[0].text_keys == tuple(map(make_text_key, ["P one, two, three", "P other"]))
    with open_writer(cache.folder, encoders=place.encoders()) as writer:
        assert make_text_key("") in writer  # for uncond_fraction
    vae = load_vae(place.model)
    path = place.clips / "b.mp4"
    pixels_TYX3 = read_clip(path, probe(path), BUCKET._replace(frames=16))[5:10]
    expected_TYXC = clip_encoder.encode_pixels(vae, pixels_TYX3)
    got_TYXC = cache.read(4).latents_TYXC.astype(np.float32)
    np.testing.assert_allclose(got_TYXC, expected_TYXC, rtol=2**-8, atol=2e-5)
    place.write_dataset("resolutions = [32]\nframe_buckets = [5]\ncaption_prefix = 'P '")
    assert place.run() == 0
    assert counted.clips == 3 + 3 + 1 + 1  # the last is of this test: first clips were there


def test_allow_drop_leaves_out_what_is_too_short(place, capsys):
    place.fill()
    _short(place)
    assert place.run() == 2
    assert "too short" in capsys.readouterr().err
    assert place.run("--allow-drop") == 0
    assert "warning: left out: " in capsys.readouterr().err
    assert set(place.stored()) == {"b.mp4", "c.png"}


def test_a_messy_folder_is_cached_as_its_preflight_says(place, counted, capsys):
    messy.write_messy_folder(place.clips)
    place.write_dataset(messy.SHAPES)
    assert place.run("--dry-run", f"output_dir={place.config.parent}") == 2
    assert (counted.captions, counted.clips) == (0, 0)
    assert place.run() == 2  # what is broken stops it, whatever may be dropped
    assert place.run("--allow-drop") == 2
    assert "10 of 33 files cannot be used" in capsys.readouterr().err.splitlines()[-1]
    for file in messy.BROKEN:
        (place.clips / file).unlink()
    assert place.run() == 2
    assert "3 of 23 files cannot be used" in capsys.readouterr().err.splitlines()[-1]
    assert (counted.captions, counted.clips) == (0, 0)
    assert place.run("--allow-drop") == 0
    assert (counted.captions, counted.clips) == (1, 20)
    ((cache, _),) = place.open()
    expected = {file: row[0] for file, row in messy.GOOD.items()} | messy.IMAGES
    assert {clip.file: str(clip.bucket) for clip in cache.clips} == expected


def test_a_file_that_changes_after_the_survey_is_refused(place, monkeypatch, capsys):
    place.fill()
    read = encode.read_clip

    def meddle(path, info, bucket, *, start):
        pixels_TYX3 = read(path, info, bucket, start=start)
        os.utime(path, ns=(0, 1))
        return pixels_TYX3

    monkeypatch.setattr(encode, "read_clip", meddle)
    assert place.run() == 2
    assert "changed while it was read" in capsys.readouterr().err


def test_stopped_run_continues(place, counted, monkeypatch):
    place.fill()
    spied = clip_encoder.start_encoding

    def stop_at_the_third(vae, pixels_TYX3):
        if counted.clips == 2:
            raise KeyboardInterrupt
        return spied(vae, pixels_TYX3)

    with monkeypatch.context() as patch:
        patch.setattr(clip_encoder, "start_encoding", stop_at_the_third)
        assert place.run() == 130
    assert not (place.clips / "cache" / "wan2.2_5b" / "clips.index").exists()
    assert place.run() == 0
    assert (counted.captions, counted.clips) == (3, 3)
    assert len(place.stored()) == 3


def test_other_model_needs_regenerate_cache(place, models, counted, capsys):
    place.fill()
    assert place.run() == 0
    other = f"model.ckpt_path={models / 'model1'}"
    assert place.run(other) == 2
    assert "other encoders" in capsys.readouterr().err
    assert len(place.stored()) == 3  # the refused run left the old cache whole
    assert place.run("--regenerate_cache", other) == 0
    assert (counted.captions, counted.clips) == (6, 6)


def test_file_names_of_any_bytes(place, capsys):
    name = os.fsdecode(b"\xff \xc3\xa4 caf\xe9.png")
    write_image(place.clips / "x.png", (40, 40))
    (place.clips / "x.png").rename(place.clips / name)
    (place.clips / name).with_suffix(".txt").write_text("a still")
    assert place.run() == 0
    assert list(place.stored()) == [name]
    assert place.run("--verify") == 0
    capsys.readouterr()
    assert place.run("--show-batch", "1") == 0
    assert "? ä caf?.png: 'a still'" in capsys.readouterr().out


def _no_caption(place):
    (place.clips / "a.txt").unlink()


def _latin_1(place):
    (place.clips / "a.txt").write_bytes("größer".encode("latin-1"))


def _junk(place):
    (place.clips / "a.mp4").write_bytes(b"junk")


def _short(place):
    write_video(place.clips / "a.mp4", 4)


def _empty_folder(place):
    shutil.rmtree(place.clips)
    place.clips.mkdir()


def _no_folder(place):
    shutil.rmtree(place.clips)


def _captions_json(place):
    (place.clips / "captions.json").write_text('{"a.mp4": ["a"], "b.mp4": ["b"]}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_caption, "a.txt: caption missing; write it"),
        (_latin_1, "a.txt: is not UTF-8 (byte 2); save it again"),
        (_junk, "a.mp4: does not decode as a video"),
        (_short, "a.mp4: too short: 4 frames at 24 fps, the shortest video bucket needs 5"),
        (_empty_folder, "holds no videos or images; put clips"),
        (_no_folder, "no such folder; correct path"),
        (_captions_json, "clips/captions.json: caption missing; write it, remove c.png"),
    ],
)
def test_bad_data_is_one_line_and_nothing_is_encoded(place, counted, capsys, spoil, message):
    place.fill()
    spoil(place)
    assert place.run() == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert str(place.clips) in last_line
    assert message in last_line
    assert (counted.captions, counted.clips) == (0, 0)
    left = [path.name for path in (place.clips / "cache").rglob("*") if path.is_file()]
    assert left in ([], ["probed.jsonl"])


def test_many_problems_are_counted_in_one_line(place, capsys):
    for number in range(8):
        (place.clips / f"{number}.mp4").write_bytes(b"junk")
    assert place.run() == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "8 of 8 files cannot be used" in last_line
    assert "4.mp4" in last_line
    assert "5.mp4" not in last_line
    assert "and 3 more" in last_line


def test_what_is_left_out_is_said(place, capsys):
    place.fill()
    (place.clips / "anim.gif").write_bytes(b"")
    (place.clips / "z.txt").write_text("no clip")
    (place.clips / "more").mkdir()
    (place.clips / ".hidden.mp4").write_bytes(b"")
    (place.clips / "meta.json").write_text("{}")
    assert place.run() == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert [Path(line.split(": ")[1]).name for line in warnings] == ["anim.gif", "z.txt", "more"]


def test_a_caption_that_is_too_long_is_said(place, capsys):
    place.fill()
    (place.clips / "a.txt").write_text("grey " * 600)
    assert place.run() == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is cut at 512" in line]
    assert ": grey grey" in line


def test_full_disk_is_said_before_encoding(place, counted, capsys, monkeypatch):
    place.fill()
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert place.run() == 2
    assert "GB free; free some space" in capsys.readouterr().err
    assert (counted.captions, counted.clips) == (0, 0)


def test_settings_of_a_directory_come_first(place):
    place.write_dataset("num_repeats = 3\nresolutions = [64]\nframe_buckets = [5]")
    place.dataset.write_text(place.dataset.read_text() + "resolutions = [32]\n")
    place.fill()
    assert place.run() == 0
    ((cache, num_repeats),) = place.open()
    assert num_repeats == 3
    assert {clip.bucket.width_px for clip in cache.clips} == {32}


def test_the_clip_mode_of_the_main_file_counts_for_readers_too(place, capsys):
    place.fill()
    place.dataset.write_text(place.dataset.read_text() + "clips_per_video = 2\n")
    for arguments in ((), ("--verify",), ("--show-batch", "1")):
        assert place.run(*arguments, "video_clip_mode=uniform") == 0
    assert "5 clips, 5 latents" in capsys.readouterr().out


def test_a_folder_listed_twice_is_refused(place, capsys):
    place.fill()
    place.dataset.write_text(
        place.dataset.read_text() + f"[[directory]]\npath = '{place.clips}/../clips'\n"
    )
    assert place.run() == 2
    assert "is listed twice" in capsys.readouterr().err


def test_two_processes_share_the_work(place, counted, capsys):
    place.fill()
    captions = [f"caption {number}" for number in range(99)]
    for part, stem in ((0, "a"), (1, "b")):
        caption = next(c for c in captions if int(make_text_key(c)[-1], 16) % 2 == part)
        (place.clips / f"{stem}.txt").write_text(caption)
    assert place.run("--process_index", "1", "--process_count", "2") == 0
    first = counted.captions + counted.clips
    assert 0 < first < 6
    assert f"{6 - first} records are left to the other processes" in capsys.readouterr().err
    assert not (place.clips / "cache" / "wan2.2_5b" / "clips.index").exists()
    assert place.run("--process_index", "0", "--process_count", "2") == 0
    assert (counted.captions, counted.clips) == (3, 3)
    assert "left to the other" not in capsys.readouterr().err
    assert len(place.stored()) == 3


@pytest.mark.parametrize(("index", "count"), [("2", "2"), ("-1", "2"), ("0", "0"), ("0", "10001")])
def test_a_process_outside_its_run_is_refused(place, capsys, index, count):
    assert place.run(f"--process_index={index}", "--process_count", count) == 2
    assert "expected 0 <= index < count <= 10000" in capsys.readouterr().err


def test_verify_and_gc(place, counted, capsys):
    place.fill()
    assert place.run("--verify") == 2
    assert "holds no complete cache; run wan22-cache" in capsys.readouterr().err
    assert place.run("--cache_only") == 0
    (place.clips / "a.txt").write_text("another caption")
    assert place.run() == 0
    assert place.run("--verify") == 0
    assert "3 clips, 3 latents, 4 text" in capsys.readouterr().out
    assert place.run("--gc") == 0
    assert "1 unused records dropped" in capsys.readouterr().out
    assert place.run("--verify") == 0
    assert "3 latents, 3 text" in capsys.readouterr().out
    assert (counted.captions, counted.clips) == (4, 3)
    assert place.run("--gc", "--process_index=0", "--process_count=2") == 2
    (first, *_) = sorted((place.clips / "cache" / "wan2.2_5b").glob("*.array_record"))
    first.write_bytes(first.read_bytes()[:300])
    assert place.run("--verify") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "records are damaged" in error
    assert "a.mp4" in error


def test_show_batch(place, capsys):
    place.fill()
    assert place.run() == 0
    capsys.readouterr()
    assert place.run("--show-batch", "1") == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 1: 32x32x[15], epoch 1, 1 of 3", head)
    (line,) = lines
    assert re.fullmatch(rf" +1 +0\.\d{{4}} [ti]2v   {place.clips}/(.)\....: '.*'", line)
    stem = line.split(f"{place.clips}/")[1][0]
    assert line.endswith(f": {CAPTIONS[stem]!r}")
    assert place.run("--show-batch", "4") == 0
    assert "epoch 2, 1 of 3" in capsys.readouterr().out
    for number in ("0", str(2**31)):
        assert place.run("--show-batch", number) == 2
        assert "steps count from 1" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--verify", "--show-batch=1", "--gc", "--regenerate_cache"])
def test_a_flag_that_does_nothing_else_stands_alone(place, capsys, other):
    assert place.run("--dry-run", other) == 2
    assert "--dry-run does nothing else" in capsys.readouterr().err


def test_masks_go_from_a_picture_to_a_batch(place):
    place.fill()
    masks = place.clips.parent / "masks"
    masks.mkdir()
    left_half = np.zeros((64, 96, 3), np.uint8)
    left_half[:, :48] = 255
    Image.fromarray(left_half).save(masks / "a.png")
    place.write_dataset("resolutions = [32]\nframe_buckets = [5]")
    place.dataset.write_text(f"{place.dataset.read_text()}mask_path = '{masks}'\n")
    assert place.run() == 0
    loader = make_loader(place.open(), seed=0, batching=make_batching(2, 2))
    batch, bucket, clips = loader[0]
    assert bucket == BUCKET
    assert batch.mask_ABYX.shape == (1, 2, 2, 2)
    for number, clip in enumerate(clips):
        expected = [[1, 0], [1, 0]] if clip == "a.mp4" else np.ones((2, 2))
        np.testing.assert_array_equal(batch.mask_ABYX[0, number].astype(np.float32), expected)
    assert place.run("--verify") == 0
