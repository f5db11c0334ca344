"""Which clips make up training step k?

A function of (seed, k) alone: each epoch shuffles the clips of each bucket, cuts them into global
batches of one bucket each and shuffles those. A run resumes from its step number, whatever the
number of reading threads. Shuffling is Grain's, from a seed that it derives from seed and epoch.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import ml_dtypes
import numpy as np

from wan22_jax.batch import Batch
from wan22_jax.data.cache import Cache, ClipEntry
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket

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
        options = grain.ReadOptions(num_threads=min(prefetch, READ_THREADS), prefetch_buffer_size=prefetch)
        return iter(self._steps[first_step:].to_iter_dataset(options))


def make_loader(
    caches: Sequence[tuple[Cache, float]],
    *,
    seed: int,
    micro_batch: int,
    accumulation: int,
    text_len: int = 512,
) -> Loader:
    """Builds the loader over one or more caches.

    Args:
        caches: each with its ``num_repeats``: how often an epoch uses its clips; 0.5 uses half.
        seed: 0 to 2**31.
        micro_batch: clips in one forward pass.
        accumulation: forward passes in one step.
        text_len: rows that a caption is zero-padded to (the transformer's ``text_len``).

    Raises:
        BadInput: no bucket has as many clips as one step takes.
    """
    members: dict[Bucket, list[tuple[Cache, ClipEntry]]] = defaultdict(list)
    for cache, num_repeats in caches:
        own: dict[Bucket, list[tuple[Cache, ClipEntry]]] = defaultdict(list)
        for clip in cache.clips:
            own[clip.bucket].append((cache, clip))
        for bucket, clips in own.items():
            count = int(len(clips) * num_repeats)
            members[bucket] += [clips[index % len(clips)] for index in range(count)]

    per_step = micro_batch * accumulation
    report = [_describe(bucket, len(members[bucket]), per_step) for bucket in sorted(members)]
    kept = [bucket for bucket in sorted(members) if len(members[bucket]) >= per_step]
    if not kept:
        raise BadInput(
            f"{', '.join(str(cache.folder) for cache, _ in caches)}: one step takes {per_step} "
            f"clips of one bucket (micro_batch_size_per_gpu x gradient_accumulation_steps), but "
            f"there are: {'; '.join(report) or 'none'}; "
            "add clips, raise num_repeats or lower those two"
        )

    def stack(rows: Sequence[tuple[ClipEntry, np.ndarray, np.ndarray]]) -> Step:
        clips, latents, texts = zip(*rows, strict=True)
        lead = (accumulation, micro_batch)
        latents_BTYXC, text_BSE = np.stack(latents), np.stack(texts)
        batch = Batch(
            latents_BTYXC.reshape(*lead, *latents_BTYXC.shape[1:]),
            text_BSE.reshape(*lead, *text_BSE.shape[1:]),
        )
        return Step(batch, clips[0].bucket, tuple(clip.file for clip in clips))

    def read(member: tuple[Cache, ClipEntry]) -> tuple[ClipEntry, np.ndarray, np.ndarray]:
        cache, clip = member
        latents_TYXC, text_SE = cache.read(clip)
        padding = text_len - len(text_SE)
        return clip, latents_TYXC, np.pad(text_SE[:text_len], ((0, max(padding, 0)), (0, 0)))

    per_bucket = [
        grain.MapDataset.source(members[bucket])
        .seed(seed + rank)
        .shuffle()
        .map(read)
        .batch(per_step, drop_remainder=True, batch_fn=stack)
        for rank, bucket in enumerate(kept)
    ]
    epoch = grain.MapDataset.concatenate(per_bucket).seed(seed).shuffle()
    return Loader(epoch.repeat(), steps_per_epoch=len(epoch), report=report)


def _describe(bucket: Bucket, clips: int, per_step: int) -> str:
    left_out = f", {clips % per_step} left out of each epoch" if clips % per_step else ""
    return f"{bucket}: {clips} clips, {clips // per_step} steps an epoch{left_out}"
