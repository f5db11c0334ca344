"""``wan22-cache``: what it encodes, what it leaves alone, and what is in the cache then."""

import json
import os
import re

import cache_place
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import test_preflight as messy
from cache_place import BUCKET, CAPTIONS, convert_model
from make_clips import write_image, write_video
from PIL import Image

from wan22_jax import clip_encoder, encode
from wan22_jax.data.batching import make_batching
from wan22_jax.data.cache import make_text_key
from wan22_jax.data.cache_writer import open_writer
from wan22_jax.data.loader import make_loader
from wan22_jax.data.video import probe, read_clip
from wan22_jax.dataset import open_caches
from wan22_jax.model_folder import load_text_encoder, load_vae, tokenizer_folder
from wan22_jax.text import encode_text, load_tokenizer

models, place, counted = cache_place.models, cache_place.place, cache_place.counted  # fixtures


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
    convert_model(models, seed=1)
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
