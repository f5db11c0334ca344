"""What travels from the cache to the train step."""

from typing import NamedTuple

import jax
import numpy as np


class CachedClip(NamedTuple):
    """One encoded clip on the host, as stored."""

    latents_TYXC: np.ndarray  # bfloat16, normalised VAE mean
    text_SE: np.ndarray  # bfloat16, as many rows as the caption has tokens (1 to 512)


class Batch(NamedTuple):
    """Micro-batches of one shape: A accumulation steps of B clips each."""

    latents_ABTYXC: np.ndarray | jax.Array  # bfloat16
    text_ABSE: np.ndarray | jax.Array  # bfloat16 [A, B, 512, E]: zero-padded, never masked
