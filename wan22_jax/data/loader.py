"""Which clips make up training step k?

A function of (seed, k) alone: each epoch shuffles the clips of each bucket, cuts them into global
batches of one bucket each and shuffles those. A run resumes from its step number, whatever the
number of reading threads. Shuffling is Grain's, from a seed that it derives from seed and epoch.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import grain
import numpy as np

from wan22_jax.batch import Batch, CachedClip
from wan22_jax.data.cache import Cache, ClipEntry
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket
from wan22_jax.text import pad_text

Member = tuple[Cache, ClipEntry]

READ_THREADS = 8  # a step reads few large records; more threads only cost memory


class Step(NamedTuple):
    """What one optimizer step trains on."""

    batch: Batch
    bucket: Bucket
    clips: tuple[str, ...]  # file names, in the batch's order


class Loader:
    """An endless sequence of steps; ``loader[k]`` is step k, counted from 0."""

    def __init__(self, steps: grain.MapDataset, *, steps_per_epoch: int, report: Sequence[str]):
        self._steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.report = tuple(report)  # one line a bucket: clips, steps and what an epoch leaves out

    def __getitem__(self, step: int) -> Step:
        return self._steps[step]

    def iterate(self, first_step: int, *, prefetch: int = 2) -> Iterator[Step]:
        """Yields the steps from ``first_step`` on, reading ``prefetch`` of them ahead."""
        options = grain.ReadOptions(
            num_threads=min(prefetch, READ_THREADS), prefetch_buffer_size=prefetch
        )
        return iter(self._steps[first_step:].to_iter_dataset(options))


def make_loader(
    caches: Sequence[tuple[Cache, float]],
    *,
    seed: int,
    micro_batch: int,
    accumulation: int,
) -> Loader:
    """Builds the loader over one or more caches.

    Args:
        caches: each with its ``num_repeats``: how often an epoch uses its clips; 0.5 uses half.
        seed: 0 to 2**31.
        micro_batch: clips in one forward pass, of all devices together.
        accumulation: forward passes in one step.

    Raises:
        BadInput: no bucket has as many clips as one step takes.
    """
    members = _group_by_bucket(caches)
    per_step = micro_batch * accumulation
    report = [_describe(bucket, len(members[bucket]), per_step) for bucket in sorted(members)]
    buckets = [bucket for bucket in sorted(members) if len(members[bucket]) >= per_step]
    if not buckets:
        raise BadInput(
            f"{', '.join(str(cache.folder) for cache, _ in caches)}: one step takes {per_step} "
            "clips of one bucket (micro_batch_size_per_gpu x gradient_accumulation_steps x GPUs), "
            f"but there are: {'; '.join(report)}; add clips, raise num_repeats or lower those"
        )
    per_bucket = [
        grain.MapDataset.source(members[bucket])
        .seed(seed + rank)
        .shuffle()
        .map(_read)
        .batch(
            per_step,
            drop_remainder=True,
            batch_fn=partial(_stack, accumulation=accumulation, micro_batch=micro_batch),
        )
        for rank, bucket in enumerate(buckets)
    ]
    epoch = grain.MapDataset.concatenate(per_bucket).seed(seed).shuffle()
    return Loader(epoch.repeat(), steps_per_epoch=len(epoch), report=report)


def _group_by_bucket(caches: Sequence[tuple[Cache, float]]) -> dict[Bucket, list[Member]]:
    members: dict[Bucket, list[Member]] = defaultdict(list)
    for cache, num_repeats in caches:
        for bucket in {clip.bucket for clip in cache.clips}:
            clips = [clip for clip in cache.clips if clip.bucket == bucket]
            count = int(len(clips) * num_repeats)
            members[bucket] += [(cache, clips[index % len(clips)]) for index in range(count)]
    return members


def _describe(bucket: Bucket, clips: int, per_step: int) -> str:
    left_out = f", {clips % per_step} left out of each epoch" if clips % per_step else ""
    return f"{bucket}: {clips} clips, {clips // per_step} steps an epoch{left_out}"


def _read(member: Member) -> tuple[ClipEntry, CachedClip]:
    cache, clip = member
    return clip, cache.read(clip)


def _stack(
    rows: Sequence[tuple[ClipEntry, CachedClip]], *, accumulation: int, micro_batch: int
) -> Step:
    clips = [clip for clip, _ in rows]
    latents_BTYXC = np.stack([arrays.latents_TYXC for _, arrays in rows])
    text_BSE = pad_text([arrays.text_SE for _, arrays in rows])
    lead = (accumulation, micro_batch)
    batch = Batch(
        latents_BTYXC.reshape(*lead, *latents_BTYXC.shape[1:]),
        text_BSE.reshape(*lead, *text_BSE.shape[1:]),
    )
    return Step(batch, clips[0].bucket, tuple(clip.file for clip in clips))
