"""Which clips does an evaluation take? All, once each, in the same batches every time.

What does not fill the last batch of a bucket is filled up with clips that count nothing.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from wan22_jax.batch import Batch
from wan22_jax.data.batching import Batching
from wan22_jax.data.cache import Cache
from wan22_jax.data.entries import Chosen, has_masks, list_entries, read_batch
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket


class EvalBatch(NamedTuple):
    """Micro-batches of one shape; all that travels to the device."""

    batch: Batch
    name_AB: np.ndarray  # uint32, of clip and caption by their contents: what noise is drawn from
    weight_AB: np.ndarray  # float32; 0 where a place is only filled up


class EvalSet:
    """One evaluation data set.

    Args:
        caches: each with its ``num_repeats``: how often its clips count.
        batching: clips in one forward pass, and forward passes in one call of the program.

    Raises:
        BadInput: there is no clip.
    """

    def __init__(self, caches: Sequence[tuple[Cache, float | int]], *, batching: Batching):
        self._caches = [cache for cache, _ in caches]
        self._batching = batching
        self._entries = {bucket: some for bucket, some in list_entries(caches).items() if len(some)}
        if not self._entries:
            folders = ", ".join(str(cache.folder) for cache in self._caches)
            raise BadInput(f"{folders}: an evaluation data set without clips; add some")

    def __len__(self) -> int:
        """How many examples count."""
        return sum(map(len, self._entries.values()))

    def __iter__(self) -> Iterator[tuple[Bucket, EvalBatch]]:
        """Reads the batches, bucket by bucket."""
        for bucket in sorted(self._entries):
            entries = self._entries[bucket]
            masked = has_masks(self._caches, entries)
            size = self._batching.per_step(bucket)
            for start in range(0, len(entries), size):
                some = entries[start : start + size].tolist()
                examples = [Chosen(self._caches[cache], *rest) for cache, *rest in some]
                yield bucket, self._read(examples, bucket, masked=masked)

    def _read(self, examples: list[Chosen], bucket: Bucket, *, masked: bool) -> EvalBatch:
        size = self._batching.per_step(bucket)
        shape_AB = self._batching.micro_batches(bucket), self._batching.micro_batch(bucket)
        is_real = np.arange(size) < len(examples)
        filled = examples + examples[-1:] * (size - len(examples))
        return EvalBatch(
            read_batch(filled, bucket, shape_AB=shape_AB, masked=masked),
            np.array([_name(one) for one in filled], np.uint32).reshape(shape_AB),
            is_real.astype(np.float32).reshape(shape_AB),
        )


def _name(example: Chosen) -> int:
    clip = example.cache.clips[example.clip]
    return zlib.crc32(f"{clip.latents_key} {clip.text_keys[example.caption or 0]}".encode())
