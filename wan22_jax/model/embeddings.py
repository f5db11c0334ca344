"""How latents and noise levels become the vectors that the transformer's blocks work on."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from wan22_jax.model.layers import along_last


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel, written as one matmul."""

    def __init__(self, num_in: int, num_out: int, *, patch_size: Sequence[int], rngs: nnx.Rngs):
        shape = (num_out, num_in, *patch_size)
        bound = np.sqrt(6 / (num_out + np.prod(shape[1:])))
        self.weight = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        )
        self.bias = nnx.Param(jnp.zeros((num_out,)))

    def __call__(self, latents_BTYXC: jax.Array) -> tuple[jax.Array, tuple[int, int, int]]:
        """Returns tokens [B, L, D] and their grid (frames, rows, columns)."""
        B, T, Y, X, C = latents_BTYXC.shape
        dim, _, _, rows, columns = self.weight.shape
        if Y % rows or X % columns:
            raise ValueError(f"latent rows {Y} and columns {X} must be multiples of {rows}")
        grid_TYX = (T, Y // rows, X // columns)
        cells = latents_BTYXC.reshape(B, T, Y // rows, rows, X // columns, columns, C)
        cells = cells.transpose(0, 1, 2, 4, 6, 3, 5)  # channel, row and column of the cell last
        flat_BLP = cells.reshape(B, int(np.prod(grid_TYX)), C * rows * columns)
        weight_DP = self.weight[...].reshape(dim, -1).astype(flat_BLP.dtype)
        x_BLD = jnp.dot(flat_BLP, weight_DP.T, precision=jax.lax.Precision.HIGHEST)
        return x_BLD + along_last(self.bias[...], x_BLD), grid_TYX


def sinusoid(timestep_BT: Float[Array, "B T"], freq_dim: int) -> Float[Array, "B T F"]:
    """Embeds timesteps in 0..1000: cosines first, then sines, frequency 10000^(-2k / freq_dim).

    The original takes the angle in float64. Here the turns are reduced to [-1/2, 1/2] from exact
    float32 partial products, so that an angle of a thousand radians keeps 1e-6.
    """
    half = freq_dim // 2
    turns = 10000.0 ** (-np.arange(half) / half) / (2 * np.pi)
    turn_BTF = jnp.zeros((*timestep_BT.shape, half))
    coarse_BT = jnp.round(timestep_BT)  # <= 1000, so 10 bits: its products below are exact
    fine_BT = timestep_BT - coarse_BT
    rest = turns
    for _ in range(3):
        part = _keep_bits(rest, 12)
        rest = rest - part
        product_BTF = coarse_BT[..., None] * jnp.asarray(part, jnp.float32)[None, None]
        turn_BTF += product_BTF - jnp.round(product_BTF)
    turn_BTF += fine_BT[..., None] * jnp.asarray(turns, jnp.float32)[None, None]
    angle_BTF = 2 * np.pi * (turn_BTF - jnp.round(turn_BTF))
    return jnp.concatenate([jnp.cos(angle_BTF), jnp.sin(angle_BTF)], axis=-1)


def _keep_bits(value: np.ndarray, bits: int) -> np.ndarray:
    """Rounds float64 to a mantissa of so many bits."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)
