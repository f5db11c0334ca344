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


def rope_angles(
    grid_TYX: tuple[int, int, int], head_dim: int
) -> tuple[Float[Array, "L P"], Float[Array, "L P"]]:
    """Returns cosine and sine for each token (f, h, w order, w fastest) and channel pair."""
    tables_cos, tables_sin = [], []
    for axis, (length, channels) in enumerate(zip(grid_TYX, axis_channels(head_dim), strict=True)):
        angle = np.outer(np.arange(length), THETA ** (-np.arange(0, channels, 2) / channels))
        shape = [1, 1, 1, channels // 2]
        shape[axis] = length
        full = (*grid_TYX, channels // 2)
        for tables, function in ((tables_cos, np.cos), (tables_sin, np.sin)):
            table = jnp.asarray(function(angle).astype(np.float32)).reshape(shape)
            tables.append(jnp.broadcast_to(table, full))
    num_tokens = int(np.prod(grid_TYX))
    cos_LP = jnp.concatenate(tables_cos, axis=-1).reshape(num_tokens, head_dim // 2)
    sin_LP = jnp.concatenate(tables_sin, axis=-1).reshape(num_tokens, head_dim // 2)
    return cos_LP, sin_LP


def apply_rope(
    x_BLHK: Float[Array, "B L H K"], cos_LP: Float[Array, "L P"], sin_LP: Float[Array, "L P"]
) -> Float[Array, "B L H K"]:
    """Rotates each pair by its token's angle in float32; the result has x's dtype."""
    pairs_BLHP2 = x_BLHK.astype(jnp.float32).reshape(*x_BLHK.shape[:-1], -1, 2)
    real_BLHP, imaginary_BLHP = pairs_BLHP2[..., 0], pairs_BLHP2[..., 1]
    cos_1L1P, sin_1L1P = cos_LP[None, :, None, :], sin_LP[None, :, None, :]
    rotated = jnp.stack(
        [
            real_BLHP * cos_1L1P - imaginary_BLHP * sin_1L1P,
            real_BLHP * sin_1L1P + imaginary_BLHP * cos_1L1P,
        ],
        axis=-1,
    )
    return rotated.reshape(x_BLHK.shape).astype(x_BLHK.dtype)
