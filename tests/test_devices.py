"""Several devices that fill one cache: its bytes, errors in their turn, what is traced."""

import itertools
import json
import os
import signal
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import cache_place
import jax
import numpy as np
import pytest
from flax import nnx
from make_clips import write_image, write_video

from wan22_jax import clip_encoder, encode, text
from wan22_jax.clip_encoder import encode_clips
from wan22_jax.errors import BadInput
from wan22_jax.model import vae as vae_file
from wan22_jax.model.vae import WanVAE
from wan22_jax.sharding import choose_devices
from wan22_jax.spread import RESULTS_A_WORKER, spread

place = cache_place.place  # a fixture
ALL = 4  # see conftest.py
NUM_CLIPS = 7


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    cache_place.convert_model(folder, seed=0)
    return folder


@pytest.fixture
def filled(place, monkeypatch):
    """Seven clips of two shapes and 25 captions, which are four batches."""
    for number in range(5):
        write_video(place.clips / f"{number}.mp4", 5, seed=30 * number)
    for number in range(5, NUM_CLIPS):
        write_image(place.clips / f"{number}.png", (64, 64), grey=30 * number)
    letters = "abcd"
    captions = {
        path.name: [f"{letter}{path.stem}" for letter in letters[: 4 if number < 4 else 3]]
        for number, path in enumerate(sorted(place.clips.iterdir()))
    }
    (place.clips / "captions.json").write_text(json.dumps(captions))
    place.write_dataset("resolutions = [32]\nframe_buckets = [5]")
    monkeypatch.setattr(encode, "BATCHES_A_DEVICE", 1)
    return place


def run_on_all(place, *arguments):
    return encode.main(["--config", str(place.config), *arguments])


def read_cache(place):
    """The bytes of its files, but for what the survey noted in the order of its threads."""
    folder = place.clips / "cache" / "wan2.2_5b"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "probed.jsonl"
    }


class Meeting:
    """Where the first call of each thread waits for those of the others."""

    def __init__(self, num_threads):
        self._barrier = threading.Barrier(num_threads)
        self._met = set()

    def enter(self):
        if threading.current_thread() not in self._met:
            self._met.add(threading.current_thread())
            self._barrier.wait(60)


def test_any_number_of_devices_writes_the_same_bytes(filled, monkeypatch, capsys):
    vae_file._encode_chunk.clear_cache()
    traced, used = [], set()
    meetings = SimpleNamespace()
    trace, start, fetch = WanVAE._encode, clip_encoder.start_encoding, clip_encoder.fetch_latents
    encode_text = text.encode_text

    def spy_on_trace(self, video_BTYX3, history):
        traced.append((video_BTYX3.shape, history.is_first))
        return trace(self, video_BTYX3, history)

    def spy_on_start(vae, pixels_TYX3):
        (device,) = vae.conv1.weight[...].devices()
        used.add(("clip", device.id))
        latents = start(vae, pixels_TYX3)
        assert all(each.devices() == {device} for each in latents)
        return latents

    def spy_on_fetch(latents):
        meetings.clips.enter()
        return fetch(latents)

    def spy_on_texts(encoder, *args):
        (device,) = encoder.norm.weight[...].devices()
        used.add(("text", device.id))
        meetings.texts.enter()
        return encode_text(encoder, *args)

    monkeypatch.setattr(WanVAE, "_encode", spy_on_trace)
    monkeypatch.setattr(clip_encoder, "start_encoding", spy_on_start)
    monkeypatch.setattr(clip_encoder, "fetch_latents", spy_on_fetch)
    monkeypatch.setattr(text, "encode_text", spy_on_texts)
    monkeypatch.setattr(text, "Lock", nullcontext)  # or the first to meet would wait for the others
    said = {
        1: "encoding on one device of 4 (cpu)",
        2: "encoding on 2 devices of 4 (cpu)",
        ALL: "encoding on 4 devices (cpu)",
    }
    caches = []
    for number, arguments in ((1, ["--devices=1"]), (2, ["--devices", "2"]), (ALL, [])):
        used.clear()
        meetings.clips, meetings.texts = Meeting(number), Meeting(number)
        assert run_on_all(filled, "--regenerate_cache", *arguments) == 0
        assert used == {(kind, device) for kind in ("clip", "text") for device in range(number)}
        assert capsys.readouterr().out.splitlines()[0] == said[number]
        caches.append(read_cache(filled))
    assert caches[0].keys() > {"clips.index", "0000-00000.array_record", "0000-00000.keys"}
    assert caches[1] == caches[0]
    assert caches[2] == caches[0]
    assert len(traced) == len(set(traced)) == 2  # once for all devices


def test_a_broken_clip_is_named_after_those_before_it(filled, monkeypatch, capsys):
    read = encode.read_clip

    def meddle(path, info, bucket, *, start):
        pixels_TYX3 = read(path, info, bucket, start=start)
        if path.name == "3.mp4":
            os.utime(path, ns=(0, 1))
        return pixels_TYX3

    with monkeypatch.context() as patch:
        patch.setattr(encode, "read_clip", meddle)
        assert run_on_all(filled) == 2
    assert "3.mp4: changed while it was read" in capsys.readouterr().err.splitlines()[-1]
    kept = [key for key in read_cache(filled) if key.endswith(".safetensors")]
    assert len(kept) == 25 + 3
    assert run_on_all(filled) == 0
    assert f"clips: 100%|██████████| {NUM_CLIPS - 3}/" in capsys.readouterr().err
    assert len(filled.stored()) == NUM_CLIPS
    assert run_on_all(filled) == 0
    assert "encoding on" not in capsys.readouterr().out  # nothing is left to do


def test_more_devices_than_clips(place, monkeypatch):
    place.fill()
    copies = []
    copy = encode.copy_to_each
    monkeypatch.setattr(
        encode, "copy_to_each", lambda *args: [copies.append(len(made := copy(*args))), made][1]
    )
    assert run_on_all(place) == 0
    assert copies == [1, 3]  # of the text encoder, which few texts do not pay for; of the VAE
    on_all = read_cache(place)
    assert run_on_all(place, "--regenerate_cache", "--devices=5") == 2
    assert read_cache(place) == on_all
    assert place.run("--regenerate_cache") == 0
    assert read_cache(place) == on_all


@pytest.mark.parametrize("number", ["0", "-1", "5"])
def test_devices_that_are_not_there_are_refused(place, capsys, number):
    place.fill()
    assert run_on_all(place, f"--devices={number}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: --devices {number}: this process sees 4 (cpu); expected 1 to 4" in error


def test_devices_of_another_kind_are_left_out(monkeypatch):
    kinds = ["large", "small", "large"]
    found = [SimpleNamespace(device_kind=kind) for kind in kinds]
    monkeypatch.setattr(jax, "local_devices", lambda: found)
    assert choose_devices() == [found[0], found[2]]
    with pytest.raises(BadInput, match=r"--devices 3: this process sees 2 \(large\)"):
        choose_devices(3)


def test_one_device_at_a_time_meets_a_new_shape(monkeypatch):
    lock, compiling, most = threading.Lock(), 0, 0
    met = set()
    vae = nnx.eval_shape(lambda: WanVAE(cache_place.VAE, rngs=nnx.Rngs(0)))
    vaes = [nnx.merge(*nnx.split(vae)) for _ in range(ALL)]

    def start(vae, pixels_TYX3):
        nonlocal compiling, most
        with lock:
            if new := (id(vae), len(pixels_TYX3)) not in met:
                met.add((id(vae), len(pixels_TYX3)))
            compiling += new
            most = max(most, compiling)
        time.sleep(0.002)
        with lock:
            compiling -= new
        return pixels_TYX3

    monkeypatch.setattr(clip_encoder, "start_encoding", start)
    monkeypatch.setattr(clip_encoder, "fetch_latents", lambda latents: latents)
    clips = [(number, np.full((number % 3, 1, 1, 3), number, np.uint8)) for number in range(60)]
    got = list(encode_clips(vaes, iter(clips)))
    assert [number for number, _ in got] == list(range(60))
    assert all((latents == number).all() for number, latents in got)
    assert most == 1


def look_ahead(worker, items):
    """Takes one more before it yields, as the VAE does; worker 0 waits for an event each time."""
    before = None
    for item in items:
        if before is not None:
            yield _wait(worker, before)
        before = item
    if before is not None:
        yield _wait(worker, before)


def _wait(worker, item):
    worker.wait(60)
    return item


def test_a_slow_worker_holds_nobody_up_but_for_room():
    slow, quick = threading.Event(), threading.Event()
    quick.set()
    begun = []

    def count(most):
        for number in range(most):
            begun.append(number)
            yield number

    results = spread(look_ahead, [slow, quick], count(1000))
    threading.Timer(0.3, slow.set).start()
    assert next(results) == 0
    # The slow one may have begun two; the quick one has gone on until there was no room.
    assert len(begun) <= 2 * RESULTS_A_WORKER + 4
    assert list(results) == list(range(1, 1000))


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("place_of_error", ["items", "run"])
def test_an_error_comes_in_its_turn_and_ends_all(error, place_of_error):
    before, begun = threading.active_count(), []

    def items():
        for number in range(100):
            if number == 10 and place_of_error == "items":
                raise error
            begun.append(number)
            yield number

    def run(_, numbers):
        for number in numbers:
            if number == 10 and place_of_error == "run":
                raise error
            yield number

    results = spread(run, range(3), items())
    assert [next(results) for _ in range(10)] == list(range(10))
    with pytest.raises(type(error)):
        next(results)
    assert len(begun) < 100
    assert threading.active_count() == before


def test_stopping_early_ends_the_threads():
    before = threading.active_count()
    results = spread(lambda _, numbers: numbers, range(3), itertools.count())
    assert [next(results) for _ in range(5)] == list(range(5))
    results.close()
    assert threading.active_count() == before


def test_an_interrupt_ends_the_wait_and_the_threads():
    before, go_on = threading.active_count(), threading.Event()

    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        go_on.set()

    results = spread(look_ahead, [go_on, go_on], itertools.count())
    timer = threading.Timer(0.2, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        sum(1 for _ in results)
    timer.join()
    assert threading.active_count() == before


def test_a_worker_that_fails_at_once_is_heard():
    def run(_, numbers):
        raise ValueError("no memory")
        yield from numbers

    with pytest.raises(ValueError, match="no memory"):
        next(spread(run, range(2), range(3)))
    assert list(spread(lambda _, numbers: numbers, range(2), [])) == []
