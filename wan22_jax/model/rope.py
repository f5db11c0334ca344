"""Rotary position embedding over (frame, row, column), as the Wan transformer applies it.

A pair is two neighbouring channels (2j, 2j+1). The pairs are divided between the axes, frames
first, and each axis has its own exponent scale (spec 1.4). Angles are made in float64 on the host
and rounded once to float32.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THETA = 10000.0


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels that rotate by frame, row and column: 44, 42, 42 of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_tables(
    grid_TYX: tuple[int, int, int], head_dim: int
) -> tuple[Float[Array, "L K"], Float[Array, "L K"]]:
    """Returns what each token's channels are multiplied with, and what their pair partners are.

    Tokens are in (f, h, w) order, w fastest; the tables hold cosine and signed sine, so that the
    rotated x is x cos + partner sin.
    """
    tables_cos, tables_sin = [], []
    for axis, (length, channels) in enumerate(zip(grid_TYX, axis_channels(head_dim), strict=True)):
        angle = np.outer(np.arange(length), THETA ** (-np.arange(0, channels, 2) / channels))
        shape = [1, 1, 1, channels]
        shape[axis] = length
        cos = np.repeat(np.cos(angle), 2, axis=1)
        sin = np.stack([-np.sin(angle), np.sin(angle)], axis=-1)
        for tables, values in ((tables_cos, cos), (tables_sin, sin)):
            table = jnp.asarray(values.astype(np.float32).reshape(shape))
            tables.append(jnp.broadcast_to(table, (*grid_TYX, channels)))
    num_tokens = int(np.prod(grid_TYX))
    cos_LK = jnp.concatenate(tables_cos, axis=-1).reshape(num_tokens, head_dim)
    sin_LK = jnp.concatenate(tables_sin, axis=-1).reshape(num_tokens, head_dim)
    return cos_LK, sin_LK


def apply_rope(
    x_BLHK: Float[Array, "B L H K"], cos_LK: Float[Array, "L K"], sin_LK: Float[Array, "L K"]
) -> Float[Array, "B L H K"]:
    """Rotates each pair by its token's angle in float32; the result has x's dtype."""
    x32_BLHK = x_BLHK.astype(jnp.float32)
    cos_1L1K, sin_1L1K = cos_LK[None, :, None, :], sin_LK[None, :, None, :]
    rotated_BLHK = x32_BLHK * cos_1L1K + swap_pairs(x32_BLHK) * sin_1L1K
    return rotated_BLHK.astype(x_BLHK.dtype)


def swap_pairs(x: Float[Array, "*N K"]) -> Float[Array, "*N K"]:
    """Exchanges the two channels of each pair."""
    return jnp.flip(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
