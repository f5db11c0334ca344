"""Rotary position embedding over (frame, row, column), as the Wan transformer applies it.

A pair is two neighbouring channels (2j, 2j+1); a head has P = K / 2. The pairs are divided between
the axes, frames first, and each axis has its own exponent scale (spec 1.4). Angles are made in
float64 on the host and rounded once to float32.
"""

import jax
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
) -> tuple[Float[Array, "L P"], Float[Array, "L P"]]:
    """Returns cosine and sine of the angle of each pair of each token.

    Tokens are in (f, h, w) order, w fastest.
    """
    tables = []
    for axis, (length, channels) in enumerate(zip(grid_TYX, axis_channels(head_dim), strict=True)):
        angle = np.outer(np.arange(length), THETA ** (-np.arange(0, channels, 2) / channels))
        shape = [1, 1, 1, channels // 2]
        shape[axis] = length
        both = (jnp.asarray(f(angle).astype(np.float32).reshape(shape)) for f in (np.cos, np.sin))
        tables.append([jnp.broadcast_to(table, (*grid_TYX, shape[-1])) for table in both])
    cos_LP, sin_LP = (
        jnp.concatenate(parts, axis=-1).reshape(-1, head_dim // 2)
        for parts in zip(*tables, strict=True)
    )
    return cos_LP, sin_LP


def apply_rope(
    x_BLHK: Float[Array, "B L H K"], cos_LP: Float[Array, "L P"], sin_LP: Float[Array, "L P"]
) -> Float[Array, "B L H K"]:
    """Rotates each pair by its token's angle in float32; the result has x's dtype."""
    pairs_BLHP2 = x_BLHK.astype(jnp.float32).reshape(*x_BLHK.shape[:-1], -1, 2)
    cos_1L1P, sin_1L1P = cos_LP[None, :, None], sin_LP[None, :, None]
    rotated = rotate_pairs(pairs_BLHP2[..., 0], pairs_BLHP2[..., 1], cos_1L1P, sin_1L1P)
    return jnp.stack(rotated, axis=-1).reshape(x_BLHK.shape).astype(x_BLHK.dtype)


def rotate_pairs(
    even: jax.Array, odd: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rotates the first and second channels of pairs; by -sin it is the gradient."""
    return even * cos - odd * sin, odd * cos + even * sin
