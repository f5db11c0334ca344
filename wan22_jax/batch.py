"""What travels from the cache to the train step."""

from typing import NamedTuple

import jax
import numpy as np


class CachedClip(NamedTuple):
    """One encoded clip on the host, as stored."""

    latents_TYXC: np.ndarray  # bfloat16, normalised VAE mean
    text_SE: np.ndarray  # bfloat16, as many rows as the caption has tokens (1 to 512)
    mask_YX: np.ndarray | None = None  # bfloat16 in [0, 1]: how much each place counts in the loss


class Batch(NamedTuple):
    """Micro-batches of one shape: A accumulation steps of B clips each."""

    latents_ABTYXC: np.ndarray | jax.Array  # bfloat16
    text_ABSE: np.ndarray | jax.Array  # bfloat16 [A, B, 512, E]: zero-padded, never masked
    mask_ABYX: np.ndarray | jax.Array | None = None  # bfloat16 in [0, 1], of the loss; None: ones
