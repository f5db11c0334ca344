import hashlib
import itertools

import ml_dtypes
import numpy as np
import pytest
from test_cache import ENCODERS

from wan22_jax.data.batching import make_batching
from wan22_jax.data.cache import make_latents_key, make_mask_key, make_text_key, open_cache
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


def make_rich_cache(folder, *, count=12, masked=(), bucket=SMALL):
    """Caption k of clip i is filled with 10 i + k + 1, the empty one with 5000."""
    clips = [
        ClipEntry(
            f"{i}",
            bucket,
            make_latents_key(f"{i}", bucket),
            tuple(make_text_key(f"{i} {caption}") for caption in range(i % 3 + 1)),
            mask_key=make_mask_key(f"{i}", bucket) if i in masked else None,
        )
        for i in range(count)
    ]
    with open_writer(folder, encoders=ENCODERS) as writer:
        writer.add(make_text_key(""), np.full((1, 8), 5000))
        for i, clip in enumerate(clips):
            writer.add(clip.latents_key, np.full((*bucket.latent_TYX, 48), i, np.float32))
            for caption, key in enumerate(clip.text_keys):
                writer.add(key, np.full((2, 8), 10 * i + caption + 1), note=f"{i} {caption}")
            if clip.mask_key:
                writer.add(clip.mask_key, np.full(bucket.latent_TYX[1:], i / 16))
        writer.finish(clips, buckets=[bucket])
    return open_cache(folder, encoders=ENCODERS, buckets=[bucket])


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    return make_rich_cache(tmp_path_factory.mktemp("rich"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), {SMALL: 9, LARGE: 14})


def load(cache, *, seed=3, micro_batch=2, accumulation=2, num_repeats=1, **options):
    return make_loader(
        [(cache, num_repeats)],
        seed=seed,
        batching=make_batching(micro_batch, micro_batch, accumulation=accumulation),
        **options,
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


def test_the_order_is_that_of_earlier_versions(cache):
    """Recorded before buckets had batch sizes of their own."""
    assert names(load(cache), (0, 1, 2, 4, 5, 11)) == [
        ("13", "22", "14", "17"),
        ("15", "10", "19", "11"),
        ("4", "6", "5", "3"),
        ("7", "0", "2", "1"),
        ("0", "7", "8", "6"),
        ("19", "11", "18", "17"),
    ]


@pytest.mark.parametrize(
    ("size", "image_size", "expected"),
    [
        (2, 3, [3, 2, 2]),
        ([[40, 5], [30, 2]], 1, [1, 5, 5]),  # sides of 45 and 91 pixels
        ([[40, 5], [80, 2]], [[64, 4], [16, 7]], [7, 5, 2]),
        ([[16, 3], [48, 4], [48, 5]], [[16, 6], [48, 8]], [6, 4, 4]),  # as near: the first
    ],
)
def test_a_bucket_takes_the_batch_size_of_the_nearest_resolution(size, image_size, expected):
    batching = make_batching(size, image_size, accumulation=3)
    buckets = [SMALL, LARGE, Bucket(128, 64, 9)]
    assert [batching.micro_batch(bucket) for bucket in buckets] == expected
    assert [batching.per_step(bucket) for bucket in buckets] == [3 * size for size in expected]


def test_buckets_batch_by_their_own_sizes(cache):
    loader = make_loader([(cache, 1)], seed=3, batching=make_batching(3, 2, accumulation=2))
    assert loader.steps_per_epoch == 9 // 4 + 14 // 6
    seen = {SMALL: 0, LARGE: 0}
    for epoch in range(2):
        taken = []
        for step in range(4 * epoch, 4 * epoch + 4):
            batch, bucket, clips = loader[step]
            size = 3 if bucket == LARGE else 2
            assert batch.latents_ABTYXC.shape == (2, size, *bucket.latent_TYX, 48)
            assert batch.text_ABSE.shape[:2] == (2, size)
            numbers = batch.latents_ABTYXC[..., 0, 0, 0, 0].ravel()
            assert [str(int(number)) for number in numbers] == list(clips)
            taken += clips
            seen[bucket] += 1
        assert len(taken) == len(set(taken)) == 2 * 4 + 2 * 6
    assert seen == {SMALL: 4, LARGE: 4}
    assert loader.report == (
        "32x32x1: 9 clips, 2 steps an epoch, 1 left out of each epoch",
        "64x32x5: 14 clips, 2 steps an epoch, 2 left out of each epoch",
    )
    steps = make_loader([(cache, 1)], seed=3, batching=make_batching(3, 2, accumulation=2))
    assert [step.clips for step in itertools.islice(steps.iterate(2), 5)] == names(
        loader, range(2, 7)
    )
    with pytest.raises(BadInput, match=r"takes 8 or 30 clips .*32x32x1: 4 clips, 0 steps"):
        make_loader([(cache, 0.5)], seed=3, batching=make_batching(15, 4, accumulation=2))


@pytest.mark.parametrize("ahead", [0, 1, 2, 16])
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
    both = make_loader([(cache, 1), (more, 1.5)], seed=0, batching=make_batching(1, 1))
    assert both.steps_per_epoch == 23 + 3


def test_too_few_clips_are_counted(cache):
    with pytest.raises(BadInput, match=r"takes 15 clips .*32x32x1: 9 clips.*64x32x5: 14 clips"):
        load(cache, micro_batch=5, accumulation=3)
    assert load(cache, micro_batch=5).steps_per_epoch == 1  # the smaller bucket has 9 of 10
    assert "32x32x1: 9 clips, 0 steps" in load(cache, micro_batch=5).report[0]


def hash_steps(steps):
    """Of everything that a step gives: clips, captions, masks, in their order."""
    digest = hashlib.sha256()
    for step in steps:
        digest.update(repr((step.clips, step.bucket)).encode())
        for array in step.batch:
            digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def test_order_and_draws_are_those_of_any_number_of_threads_and_of_a_resume(tmp_path):
    """With captions, dropout, masks, repeats and a part of the data, over five epochs."""
    rich = make_rich_cache(tmp_path, masked=(1, 4))
    options = {"uncond_fraction": 0.3, "num_repeats": 1.5, "subsample_ratio": 0.7}

    def read(ahead, first=0):
        return list(itertools.islice(load(rich, **options).iterate(first, ahead=ahead), 30 - first))

    expected = hash_steps(load(rich, **options)[step] for step in range(30))
    assert load(rich, **options).steps_per_epoch == 6
    for ahead in (0, 2, 4):
        assert hash_steps(read(ahead)) == expected
        stopped = [load(rich, **options)[step] for step in range(17)]
        assert hash_steps([*stopped, *read(ahead, 17)]) == expected
    assert hash_steps(load(rich, seed=4, **options)[step] for step in range(30)) != expected


def test_each_caption_is_an_entry_of_an_epoch(rich):
    loader = load(rich, micro_batch=1, accumulation=1)
    assert loader.steps_per_epoch == 24
    for epoch in range(2):
        seen = set()
        for step in range(24 * epoch, 24 * epoch + 24):
            batch, _, (clip,) = loader[step]
            assert (batch.latents_ABTYXC == int(clip)).all()
            caption = int(batch.text_ABSE[0, 0, 0, 0]) - 10 * int(clip) - 1
            seen.add((int(clip), caption))
        assert seen == {(i, caption) for i in range(12) for caption in range(i % 3 + 1)}
    half = load(rich, micro_batch=1, accumulation=1, num_repeats=0.5)
    assert sorted(itertools.chain(*names(half, range(12)))) == sorted(map(str, range(12)))


def test_share_of_dropped_captions(rich):
    loader = load(rich, uncond_fraction=0.2)
    chosen = [loader.choose(step)[1] for step in range(1000)]
    dropped = np.array([[one.caption is None for one in step] for step in chosen])
    assert dropped.shape == (1000, 4)
    # Binomial: 0.2 +- 4 standard deviations, at each position and in all.
    assert abs(dropped.mean() - 0.2) < 4 * (0.16 / 4000) ** 0.5
    assert (abs(dropped.mean(axis=0) - 0.2) < 4 * (0.16 / 1000) ** 0.5).all()
    counts = np.bincount(dropped.sum(axis=1), minlength=5)  # independent within a step
    expected = [0.8**4, 4 * 0.8**3 * 0.2, 6 * 0.16 * 0.16, 4 * 0.8 * 0.2**3, 0.2**4]
    assert (abs(counts / 1000 - expected) < 4 * np.sqrt(np.array(expected) / 1000)).all()
    plain = load(rich)
    for step in range(20):
        kept = plain.choose(step)[1]
        for number, (one, other) in enumerate(zip(chosen[step], kept, strict=True)):
            assert (one.clip, one.caption) in ((other.clip, other.caption), (other.clip, None))
            text = loader[step].batch.text_ABSE[divmod(number, 2)]
            assert (text[0] == 5000).all() == (one.caption is None)
    assert not np.array_equal(
        dropped,
        [
            [one.caption is None for one in load(rich, seed=4, uncond_fraction=0.2).choose(step)[1]]
            for step in range(1000)
        ],
    )
    assert all(one.caption is None for one in load(rich, uncond_fraction=1).choose(0)[1])


def test_dropout_needs_the_empty_caption(cache):
    with pytest.raises(BadInput, match=r"no empty caption.*uncond_fraction = 0\.1.*wan22-cache"):
        load(cache, uncond_fraction=0.1)


def test_masks_fill_up_with_ones(tmp_path, rich):
    loader = load(make_rich_cache(tmp_path, masked=(1, 4)))
    for step in range(loader.steps_per_epoch):
        batch, _, clips = loader[step]
        assert batch.mask_ABYX.shape == (2, 2, 2, 2)
        assert batch.mask_ABYX.dtype == ml_dtypes.bfloat16
        for number, clip in enumerate(clips):
            expected = int(clip) / 16 if clip in ("1", "4") else 1
            assert (batch.mask_ABYX[divmod(number, 2)] == expected).all()
    assert all(load(rich)[step].batch.mask_ABYX is None for step in range(6))


def test_masks_of_one_bucket_leave_the_others_alone(tmp_path, cache):
    both = make_loader(
        [(make_rich_cache(tmp_path, masked=(1,)), 1), (cache, 1)],
        seed=0,
        batching=make_batching(2, 2),
    )
    for step in range(both.steps_per_epoch):
        batch, bucket, _ = both[step]
        assert (batch.mask_ABYX is not None) == (bucket == SMALL)


def test_processes_share_each_micro_batch(rich):
    options = {"micro_batch": 4, "accumulation": 2, "uncond_fraction": 0.3}
    whole = load(rich, **options)
    parts = [load(rich, **options, own=(range(i, i + 1), 2)) for i in range(2)]
    taken = []
    for step in range(3 * whole.steps_per_epoch):
        own = [part[step] for part in parts]
        for part in own:
            assert part.batch.latents_ABTYXC.shape[:2] == (2, 2)
            assert part.clips == whole[step].clips
        for field in ("latents_ABTYXC", "text_ABSE"):
            joined = np.concatenate([getattr(part.batch, field) for part in own], axis=1)
            np.testing.assert_array_equal(joined, getattr(whole[step].batch, field))
        taken.append([part.batch.latents_ABTYXC[..., 0, 0, 0, 0].ravel() for part in own])
    assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch}
    assert all((a != b).any() for a, b in taken)


def test_processes_read_disjoint_parts(cache):
    """Where every entry is another clip, no process sees what another one does."""
    parts = [load(cache, own=(range(i, i + 1), 2)) for i in range(2)]
    seen = [set(), set()]
    for step in range(parts[0].steps_per_epoch):
        for part, clips in zip(parts, seen, strict=True):
            clips |= set(part[step].batch.latents_ABTYXC[..., 0, 0, 0, 0].ravel().tolist())
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == {
        float(clip) for step in range(parts[0].steps_per_epoch) for clip in parts[0][step].clips
    }


def test_a_part_of_the_data(cache):
    part = load(cache, subsample_ratio=0.5)
    whole = load(cache)
    assert (part.steps_per_epoch, whole.steps_per_epoch) == (2, 5)
    for epoch in range(4):  # the first batches of the shuffled order
        first = names(whole, range(5 * epoch, 5 * epoch + 2))
        assert names(part, range(2 * epoch, 2 * epoch + 2)) == first
    assert part.report[-1] == "subsample_ratio keeps 2 of 5 steps, others each epoch"
    assert load(cache, subsample_ratio=1).report == whole.report
    with pytest.raises(BadInput, match=r"subsample_ratio = 0\.1 of the 5 steps .* leaves none"):
        load(cache, subsample_ratio=0.1)


def test_an_order_is_an_array_of_numbers(cache):
    loader = load(cache, num_repeats=1000)
    order = loader._order(0)
    assert order.shape == (23000 // 4, 4)
    assert order.dtype == np.int64
    assert loader._entries.nbytes == 10 * 23000
