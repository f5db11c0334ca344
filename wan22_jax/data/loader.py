"""Which clips make up training step k?

A function of (seed, k) alone: each epoch shuffles the clips of each bucket, cuts them into global
batches of one bucket each and shuffles those. So a run resumes from its step number, and the
number of reading threads changes nothing. Grain reads ahead; its own shuffle is not used because
it costs milliseconds per clip where there are few clips.
"""

import functools
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from wan22_jax.batch import Batch
from wan22_jax.data.cache import Cache
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket
from wan22_jax.text import pad_text

Member = tuple[Cache, int]  # a clip by its number in the cache


class Step(NamedTuple):
    """What one optimizer step trains on."""

    batch: Batch
    bucket: Bucket
    clips: tuple[str, ...]  # file names, in the batch's order


def make_loader(
    caches: Sequence[tuple[Cache, float | int]],
    *,
    seed: int,
    micro_batch: int,
    accumulation: int,
) -> "Loader":
    """Builds the loader over one or more caches.

    Args:
        caches: each with its ``num_repeats``: how often an epoch uses its clips; 0.5 uses half.
        seed: not negative.
        micro_batch: clips in one forward pass, of all devices together.
        accumulation: forward passes in one step.

    Raises:
        BadInput: no bucket has as many clips as one step takes.
    """
    members = _group_by_bucket(caches)
    per_step = micro_batch * accumulation
    report = [_describe(bucket, len(members[bucket]), per_step) for bucket in sorted(members)]
    usable = {b: members[b] for b in sorted(members) if len(members[b]) >= per_step}
    if not usable:
        raise BadInput(
            f"{', '.join(str(cache.folder) for cache, _ in caches)}: one step takes {per_step} "
            "clips of one bucket (micro_batch_size_per_gpu x gradient_accumulation_steps x GPUs), "
            f"but there are: {'; '.join(report)}; add clips, raise num_repeats or lower those"
        )
    return Loader(usable, seed=seed, lead=(accumulation, micro_batch), report=report)


class Loader:
    """An endless sequence of steps; ``loader[k]`` is step k, counted from 0.

    Attributes:
        steps_per_epoch: how many steps go over the data once.
        report: a line per bucket: its clips, its steps, and how many clips each epoch leaves out
            (others every time).
    """

    def __init__(
        self,
        members: Mapping[Bucket, Sequence[Member]],
        *,
        seed: int,
        lead: tuple[int, int],
        report: Sequence[str],
    ):
        self._members = members
        self._seed = seed
        self._lead = lead  # accumulation, micro-batch
        self._per_step = lead[0] * lead[1]
        self._order = functools.lru_cache(2)(self._shuffle)  # steps read ahead span two epochs
        self.steps_per_epoch = sum(len(clips) // self._per_step for clips in members.values())
        self.report = tuple(report)

    def __getitem__(self, step: int) -> Step:
        epoch, position = divmod(step, self.steps_per_epoch)
        bucket, rows = self._order(epoch)[position]
        chosen = [self._members[bucket][row] for row in rows]
        arrays = [cache.read(number) for cache, number in chosen]
        batch = Batch(
            self._split(np.stack([clip.latents_TYXC for clip in arrays])),
            self._split(pad_text([clip.text_SE for clip in arrays])),
        )
        return Step(batch, bucket, tuple(cache.clips.file(number) for cache, number in chosen))

    def iterate(self, first_step: int, *, ahead: int = 2) -> Iterator[Step]:
        """Yields the steps from ``first_step`` on, while threads read this many ``ahead``."""
        steps = grain.MapDataset.range(first_step, sys.maxsize).map(self.__getitem__)
        options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        return iter(steps.to_iter_dataset(options))

    def _shuffle(self, epoch: int) -> list[tuple[Bucket, np.ndarray]]:
        rng = np.random.default_rng((self._seed, epoch))
        batches = []
        for bucket, clips in self._members.items():
            shuffled = rng.permutation(len(clips))
            whole = len(clips) // self._per_step * self._per_step
            batches += [(bucket, rows) for rows in shuffled[:whole].reshape(-1, self._per_step)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _split(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(*self._lead, *array.shape[1:])


def _group_by_bucket(caches: Sequence[tuple[Cache, float | int]]) -> dict[Bucket, list[Member]]:
    members: dict[Bucket, list[Member]] = defaultdict(list)
    for cache, num_repeats in caches:
        for index, bucket in enumerate(cache.clips.buckets):
            clips = np.flatnonzero(cache.clips.bucket_N == index)
            count = int(len(clips) * num_repeats)
            members[bucket] += [(cache, int(clips[index % len(clips)])) for index in range(count)]
    return members


def _describe(bucket: Bucket, clips: int, per_step: int) -> str:
    left_out = f", {clips % per_step} left out of each epoch" if clips % per_step else ""
    return f"{bucket}: {clips} clips, {clips // per_step} steps an epoch{left_out}"
