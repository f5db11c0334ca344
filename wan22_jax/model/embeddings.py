"""The ends of the transformer: latents and noise levels to vectors, and vectors to a velocity."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from wan22_jax.model.fused import layer_norm
from wan22_jax.model.layers import Linear, along_last
from wan22_jax.model.shards import Tokens


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


class Head(nnx.Module):
    """Final norm, modulation and projection; float32 throughout."""

    def __init__(
        self, dim: int, num_out: int, *, patch_size: Sequence[int], eps: float, rngs: nnx.Rngs
    ):
        self.num_out, self.patch_size, self.eps = num_out, tuple(patch_size), eps
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (1, 2, dim)) / np.sqrt(dim))
        self.head = Linear(dim, num_out * int(np.prod(patch_size)), rngs=rngs)

    def __call__(
        self,
        x_BLD: jax.Array,
        time_BTD: jax.Array,
        grid_TYX: tuple[int, int, int],
        tokens: Tokens,
    ) -> jax.Array:
        """Returns [B, T, Y, X, C]; within a token the channel is last, after row and column."""
        B = x_BLD.shape[0]
        T, Y, X = grid_TYX
        _, rows, columns = self.patch_size
        modulation_BT2D = self.modulation[...].astype(jnp.float32)[None] + time_BTD[:, :, None]
        shift_BTD, scale_BTD = modulation_BT2D[:, :, 0], modulation_BT2D[:, :, 1]
        x_BLD = modulate(layer_norm(x_BLD, eps=self.eps), shift_BTD, scale_BTD)
        cells = tokens.all(self.head(x_BLD))
        cells = cells.reshape(B, T, Y, X, rows, columns, self.num_out)
        cells = cells.transpose(0, 1, 2, 4, 3, 5, 6)
        return cells.reshape(B, T, Y * rows, X * columns, self.num_out)


def modulate(x_BLD: jax.Array, shift_BTD: jax.Array, scale_BTD: jax.Array) -> jax.Array:
    """Returns x (1 + scale) + shift with one scale and shift per latent frame."""
    B, T, D = shift_BTD.shape
    x_BTPD = x_BLD.reshape(B, T, -1, D) * (1 + scale_BTD[:, :, None]) + shift_BTD[:, :, None]
    return x_BTPD.reshape(x_BLD.shape)


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
