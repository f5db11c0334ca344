"""Rectified flow: the straight line from data (sigma = 0) to noise (sigma = 1).

Training draws as diffusion-pipe does (its behaviour, section 3.1): a grid of 10,000 quantiles of
the chosen density, shifted towards noise, cut to [min_t, max_t), and a uniform index into it.
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

GRID_SIZE = 10_000


def shift_sigma(sigma: np.ndarray, *, shift: float) -> np.ndarray:
    """Warps uniform sigma towards noise; shift 1 is the identity, Wan2.2-5B samples with 5."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flux_shift(num_tokens_per_frame: int) -> float:
    """Returns e^mu; mu is linear in the tokens of a frame: 0.5 at 256, 1.15 at 4096."""
    return float(np.exp(0.5 + (num_tokens_per_frame - 256) * (1.15 - 0.5) / (4096 - 256)))


def sigma_grid(
    *,
    method: str = "logit_normal",
    sigmoid_scale: float = 1.0,
    shift: float = 1.0,
    min_t: float = 0.0,
    max_t: float = 1.0,
) -> np.ndarray:
    """Returns the float32 sigmas, ascending, from which training draws uniformly.

    Args:
        method: "logit_normal" or "uniform".
        sigmoid_scale: width of the logit-normal density.
        shift: see ``shift_sigma``.
        min_t: lowest sigma kept.
        max_t: sigmas from here up are left out, 1 keeps all.

    Raises:
        ValueError: the method is unknown, or no grid point lies in [min_t, max_t).
    """
    quantiles = np.linspace(1e-4, 1 - 1e-4, GRID_SIZE)
    if method == "logit_normal":
        normal = np.array([NormalDist().inv_cdf(q) for q in quantiles])
        sigma = 1 / (1 + np.exp(-sigmoid_scale * normal))
    elif method == "uniform":
        sigma = quantiles
    else:
        raise ValueError(f"timestep_sample_method {method!r}: expected logit_normal or uniform")
    sigma = shift_sigma(sigma, shift=shift)
    first, last = np.searchsorted(sigma, [min_t, max_t])
    if first >= last:
        raise ValueError(f"no sigma lies in [min_t, max_t) = [{min_t}, {max_t})")
    return sigma[first:last].astype(np.float32)


def sample_sigma(grid: Float[Array, " G"], key: Array) -> Float[Array, ""]:
    """Draws one sigma uniformly from the grid."""
    return grid[jax.random.randint(key, (), 0, grid.shape[0])]


def add_noise(
    clean_BTYXC: Float[Array, "B T Y X C"],
    noise_BTYXC: Float[Array, "B T Y X C"],
    sigma_BT: Float[Array, "B T"],
) -> Float[Array, "B T Y X C"]:
    """Mixes clean latents with noise; sigma is per frame so that frame 0 may stay clean."""
    sigma_BT111 = sigma_BT[:, :, None, None, None]
    return (1 - sigma_BT111) * clean_BTYXC + sigma_BT111 * noise_BTYXC


@dataclass(frozen=True)
class Penalty:
    """What an error r of one element costs; large errors cost less than their square.

    - "squared": r^2
    - "huber", scale d: r^2 / 2 up to d, then d (|r| - d / 2)
    - "smooth_l1", scale b: r^2 / (2 b) up to b, then |r| - b / 2
    - "pseudo_huber", scale c: sqrt(r^2 + c^2) - c, which is r^2 / (2 c) near 0 and |r| - c far off

    The first three are PyTorch's mse_loss, huber_loss and smooth_l1_loss, the last is what
    diffusion-pipe's ``pseudo_huber_c`` was.
    """

    kind: Literal["squared", "huber", "smooth_l1", "pseudo_huber"] = "squared"
    scale: float = 1.0

    def __call__(self, error: jax.Array) -> jax.Array:
        """Returns the cost of each error, in the error's dtype."""
        if self.kind == "squared":
            return jnp.square(error)
        scale, size, square = self.scale, jnp.abs(error), jnp.square(error)
        if self.kind == "huber":
            return jnp.where(size <= scale, 0.5 * square, scale * (size - 0.5 * scale))
        if self.kind == "smooth_l1":
            return jnp.where(size < scale, 0.5 * square / scale, size - 0.5 * scale)
        # The difference of two near numbers, put so that small errors do not drown in rounding.
        return square / (jnp.sqrt(square + scale * scale) + scale)


SQUARED = Penalty()


def velocity_loss(
    velocity_BTYXC: Float[Array, "B T Y X C"],
    clean_BTYXC: Float[Array, "B T Y X C"],
    noise_BTYXC: Float[Array, "B T Y X C"],
    weight_BT: Float[Array, "B T"],
    mask_BYX: Float[Array, "B Y X"] | None = None,
    *,
    penalty: Penalty = SQUARED,
) -> Float[Array, " B"]:
    """Mean penalty of the error to noise - clean over the frames with weight 1, one an example.

    Float32. A frame of weight 0 (a given frame) is left out of sum and count alike, so a
    text-to-video example is the plain mean over all its elements. A mask multiplies the penalties
    of every frame and channel and leaves their count as it is (diffusion-pipe, section 3.2).
    """
    target_BTYXC = noise_BTYXC.astype(jnp.float32) - clean_BTYXC.astype(jnp.float32)
    cost_BTYXC = penalty(velocity_BTYXC.astype(jnp.float32) - target_BTYXC)
    if mask_BYX is not None:
        cost_BTYXC *= mask_BYX.astype(jnp.float32)[:, None, :, :, None]
    frame_loss_BT = jnp.mean(cost_BTYXC, axis=(2, 3, 4))
    return jnp.sum(frame_loss_BT * weight_BT, axis=1) / jnp.sum(weight_BT, axis=1)
