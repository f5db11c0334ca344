"""Which clips make up training step k?

A function of (seed, k) alone: each epoch shuffles the clips of each bucket, cuts them into global
batches of one bucket each and shuffles those. So a run resumes from its step number, and neither
the number of reading threads nor that of processes changes anything. Grain reads ahead; its own
shuffle is not used because it costs milliseconds per clip where there are few clips.

An epoch has an entry for each caption of a clip. Its order is one array of entry numbers, so a
million clips take megabytes.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from wan22_jax.batch import Batch
from wan22_jax.data.batching import Batching, count_steps
from wan22_jax.data.cache import Cache
from wan22_jax.data.entries import Chosen, has_masks, list_entries, read_batch
from wan22_jax.data.index import NOWHERE
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket

_UNCOND = 1  # sets the draws of caption dropout apart from those of the order


class Step(NamedTuple):
    """What one optimizer step trains on."""

    batch: Batch  # of this process
    bucket: Bucket
    clips: tuple[str, ...]  # file names of the global batch, in its order


def make_loader(
    caches: Sequence[tuple[Cache, float | int]],
    *,
    seed: int,
    batching: Batching,
    subsample_ratio: float | int | None = None,
    uncond_fraction: float | int = 0,
    own: tuple[range, int] = (range(1), 1),
) -> "Loader":
    """Builds the loader over one or more caches.

    Args:
        caches: each with its ``num_repeats``: how often an epoch uses its clips; 0.5 uses half.
        seed: not negative.
        batching: clips in one forward pass, of all devices and processes together, and forward
            passes in one step.
        subsample_ratio: an epoch ends after this share of its steps; others every time.
        uncond_fraction: probability that the empty caption takes the place of a clip's own.
        own: reads these parts of every micro-batch, of so many equal ones.

    Raises:
        BadInput: no bucket has as many clips as one step takes, an epoch has no step, a cache has
            no empty caption though one is asked for, or steps do not divide into micro-batches.
    """
    for cache, _ in caches:
        if uncond_fraction and cache.uncond_row == NOWHERE:
            raise BadInput(
                f"{cache.folder}: holds no empty caption, which uncond_fraction = "
                f"{uncond_fraction} needs; run wan22-cache on this dataset"
            )
    entries = list_entries(caches)
    counts = {bucket: len(entries[bucket]) for bucket in sorted(entries)}
    length = count_steps(counts, batching, subsample_ratio=subsample_ratio)
    for bucket in counts:
        if not batching.micro_batches(bucket):
            raise BadInput(
                f"global_batch_size = {batching.clips_per_step}: {bucket} takes "
                f"{batching.micro_batch(bucket)} clips a forward pass (micro_batch_size_per_gpu x "
                "GPUs that have examples of their own); give a multiple of that"
            )
    report = [_describe(bucket, counts[bucket], batching.per_step(bucket)) for bucket in counts]
    usable = {bucket: entries[bucket] for bucket in counts if length.steps[bucket]}
    if not usable:
        takes = " or ".join(map(str, sorted({batching.per_step(bucket) for bucket in counts})))
        raise BadInput(
            f"{', '.join(str(cache.folder) for cache, _ in caches)}: one step takes {takes} "
            "clips of one bucket (micro_batch_size_per_gpu x gradient_accumulation_steps x GPUs), "
            f"but there are: {'; '.join(report)}; add clips, raise num_repeats or lower those"
        )
    num_steps = length.kept + length.left_out
    if not length.kept:
        raise BadInput(
            f"subsample_ratio = {subsample_ratio} of the {num_steps} steps of an epoch leaves "
            "none; raise it"
        )
    if length.left_out:
        report.append(
            f"subsample_ratio keeps {length.kept} of {num_steps} steps, others each epoch"
        )
    return Loader(
        [cache for cache, _ in caches],
        usable,
        seed=seed,
        batching=batching,
        steps_per_epoch=length.kept,
        uncond_fraction=uncond_fraction,
        own=own,
        report=report,
    )


class Loader:
    """An endless sequence of steps; ``loader[k]`` is step k, counted from 0.

    Attributes:
        steps_per_epoch: how many steps go over the data once.
        report: a line per bucket: its clips, its steps, and how many clips each epoch leaves out
            (others every time).
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        entries: dict[Bucket, np.ndarray],
        *,
        seed: int,
        batching: Batching,
        steps_per_epoch: int,
        uncond_fraction: float | int,
        own: tuple[range, int],
        report: Sequence[str],
    ):
        self._caches = caches
        self._buckets = list(entries)
        self._sizes = [len(some) for some in entries.values()]
        self._entries = np.concatenate(list(entries.values()))
        self._bucket_start = np.cumsum([0, *self._sizes])
        self._masked = [has_masks(caches, some) for some in entries.values()]
        self._seed = seed
        self._batching = batching
        self._own = own
        self._uncond_fraction = uncond_fraction
        self._order = functools.lru_cache(2)(self._shuffle)  # steps read ahead span two epochs
        self.steps_per_epoch = steps_per_epoch
        self.report = tuple(report)

    def __getitem__(self, step: int) -> Step:
        bucket, chosen = self.choose(step)
        own_AB = self._list_own(bucket)
        own = [chosen[position] for position in own_AB.flat]
        # Masks not by the batch: one program a bucket.
        masked = self._masked[self._buckets.index(bucket)]
        batch = read_batch(own, bucket, shape_AB=own_AB.shape, masked=masked)
        return Step(batch, bucket, tuple(one.file for one in chosen))

    def choose(self, step: int) -> tuple[Bucket, list[Chosen]]:
        """Returns the bucket and the global batch of a step without reading it."""
        epoch, position = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[position]
        rows = rows[rows != NOWHERE]
        bucket = int(np.searchsorted(self._bucket_start, rows[0], side="right")) - 1
        draws = np.random.default_rng((self._seed, step, _UNCOND)).random(len(rows))
        dropped = draws < self._uncond_fraction
        return self._buckets[bucket], [
            Chosen(self._caches[cache], clip, None if is_dropped else caption)
            for (cache, clip, caption), is_dropped in zip(
                self._entries[rows].tolist(), dropped, strict=True
            )
        ]

    def iterate(self, first_step: int, *, ahead: int = 2) -> Iterator[Step]:
        """Yields the steps from ``first_step`` on, while threads read this many ``ahead``."""
        steps = grain.MapDataset.range(first_step, sys.maxsize).map(self.__getitem__)
        options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        return iter(steps.to_iter_dataset(options))

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Draws the entries of each step of an epoch, [steps, clips], NOWHERE behind the last."""
        rng = np.random.default_rng((self._seed, epoch))
        per_step = [self._batching.per_step(bucket) for bucket in self._buckets]
        batches = []
        for start, size, count in zip(self._bucket_start[:-1], self._sizes, per_step, strict=True):
            shuffled = start + rng.permutation(size)[: size // count * count].reshape(-1, count)
            fill = ((0, 0), (0, max(per_step) - count))
            batches.append(np.pad(shuffled, fill, constant_values=NOWHERE))
        return rng.permutation(np.concatenate(batches))[: self.steps_per_epoch]

    def _list_own(self, bucket: Bucket) -> np.ndarray:
        """Lists the positions in a global batch that this process reads, [A, B]."""
        parts, count = self._own
        size = self._batching.micro_batch(bucket)
        positions_AB = np.arange(self._batching.per_step(bucket)).reshape(-1, size)
        return positions_AB[:, size // count * parts.start : size // count * parts.stop]


def _describe(bucket: Bucket, clips: int, per_step: int) -> str:
    left_out = f", {clips % per_step} left out of each epoch" if clips % per_step else ""
    return f"{bucket}: {clips} clips, {clips // per_step} steps an epoch{left_out}"
