import itertools

import ml_dtypes
import numpy as np
import pytest
from test_cache import ENCODERS

from wan22_jax.data.cache import make_latents_key, make_text_key, open_cache
from wan22_jax.data.cache_writer import open_writer
from wan22_jax.data.index import ClipEntry
from wan22_jax.data.loader import make_loader
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket

SMALL, LARGE = Bucket(32, 32, 1), Bucket(64, 32, 5)


def make_cache(folder, counts):
    """Latents of clip i are all i; its caption has i % 5 + 1 rows of i + 1."""
    buckets = [bucket for bucket, count in counts.items() for _ in range(count)]
    clips = [
        ClipEntry(f"{i}", bucket, make_latents_key(f"{i}", bucket), (make_text_key(f"{i}"),))
        for i, bucket in enumerate(buckets)
    ]
    with open_writer(folder, encoders=ENCODERS) as writer:
        for i, clip in enumerate(clips):
            writer.add(clip.latents_key, np.full((*clip.bucket.latent_TYX, 48), i, np.float32))
            writer.add(clip.text_keys[0], np.full((i % 5 + 1, 8), i + 1, np.float32))
        writer.finish(clips, buckets=list(counts))
    return open_cache(folder, encoders=ENCODERS, buckets=list(counts))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), {SMALL: 9, LARGE: 14})


def load(cache, *, seed=3, micro_batch=2, accumulation=2, num_repeats=1):
    return make_loader(
        [(cache, num_repeats)], seed=seed, micro_batch=micro_batch, accumulation=accumulation
    )


def names(loader, steps):
    return [loader[step].clips for step in steps]


def test_batches_hold_their_clips(cache):
    loader = load(cache)
    for step in range(loader.steps_per_epoch):
        batch, bucket, clips = loader[step]
        assert batch.latents_ABTYXC.shape == (2, 2, *bucket.latent_TYX, 48)
        assert batch.text_ABSE.shape == (2, 2, 512, 8)
        assert batch.latents_ABTYXC.dtype == batch.text_ABSE.dtype == ml_dtypes.bfloat16
        for flat, clip in enumerate(clips):
            where = divmod(flat, 2)
            number = int(clip)
            assert (batch.latents_ABTYXC[where] == number).all()
            rows = number % 5 + 1
            assert (batch.text_ABSE[where][:rows] == number + 1).all()
            assert (batch.text_ABSE[where][rows:] == 0).all()


def test_an_epoch_takes_each_clip_at_most_once(cache):
    loader = load(cache)
    assert loader.steps_per_epoch == 9 // 4 + 14 // 4
    for epoch in range(3):
        first = epoch * loader.steps_per_epoch
        taken = list(itertools.chain(*names(loader, range(first, first + loader.steps_per_epoch))))
        assert len(taken) == len(set(taken)) == 20
    assert loader.report == (
        "32x32x1: 9 clips, 2 steps an epoch, 1 left out of each epoch",
        "64x32x5: 14 clips, 3 steps an epoch, 2 left out of each epoch",
    )


def test_no_clip_is_left_out_for_ever(cache):
    loader = load(cache)
    taken = set(itertools.chain(*names(loader, range(20 * loader.steps_per_epoch))))
    assert taken == {str(i) for i in range(23)}


def test_epochs_and_seeds_differ(cache):
    loader = load(cache)
    size = loader.steps_per_epoch
    epochs = [tuple(names(loader, range(size * e, size * e + size))) for e in range(4)]
    assert len(set(epochs)) == 4
    assert names(load(cache, seed=4), range(size)) != list(epochs[0])
    orders = {tuple(loader[size * e + k].bucket for k in range(size)) for e in range(10)}
    assert len(orders) > 1  # buckets alternate in another order each epoch


@pytest.mark.parametrize("ahead", [1, 2, 16])
def test_iteration_resumes_at_any_step(cache, ahead):
    expected = names(load(cache), range(30))
    for first in (0, 4, 5, 17):
        steps = load(cache).iterate(first, ahead=ahead)
        got = [next(steps) for _ in range(30 - first)]
        assert [step.clips for step in got] == expected[first:]
        for step, k in zip(got, range(first, 30), strict=True):
            for array, again in zip(step.batch, load(cache)[k].batch, strict=True):
                np.testing.assert_array_equal(array, again)


def test_repeats(cache, tmp_path):
    assert load(cache, num_repeats=2).steps_per_epoch == 18 // 4 + 28 // 4
    half = load(cache, num_repeats=0.5)
    assert half.steps_per_epoch == 4 // 4 + 7 // 4
    taken = set(itertools.chain(*names(half, range(40))))
    assert len(taken) == 4 + 7
    more = make_cache(tmp_path, {LARGE: 2})
    both = make_loader([(cache, 1), (more, 1.5)], seed=0, micro_batch=1, accumulation=1)
    assert both.steps_per_epoch == 23 + 3


def test_too_few_clips_are_counted(cache):
    with pytest.raises(BadInput, match=r"takes 15 clips .*32x32x1: 9 clips.*64x32x5: 14 clips"):
        load(cache, micro_batch=5, accumulation=3)
    assert load(cache, micro_batch=5).steps_per_epoch == 1  # the smaller bucket has 9 of 10
    assert "32x32x1: 9 clips, 0 steps" in load(cache, micro_batch=5).report[0]
