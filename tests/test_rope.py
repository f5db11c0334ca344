"""Rotary embedding against complex numbers in float64, written from the definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from wan22_jax.model.rope import apply_rope, axis_channels, rope_tables


@pytest.mark.parametrize(
    ("head_dim", "channels"),
    [(128, (44, 42, 42)), (64, (24, 20, 20)), (28, (12, 8, 8)), (24, (8, 8, 8))],
)
def test_axes_share_the_channels(head_dim, channels):
    assert axis_channels(head_dim) == channels


@pytest.mark.parametrize(("head_dim", "grid"), [(128, (3, 2, 5)), (64, (1, 4, 3)), (28, (5, 1, 2))])
def test_rotation_is_that_of_complex_numbers(head_dim, grid):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, int(np.prod(grid)), 3, head_dim)).astype(np.float32)
    got = apply_rope(jnp.asarray(x), *rope_tables(grid, head_dim))
    assert got.dtype == jnp.float32
    assert np.abs(got - rotate(x, grid)).max() < 1e-6 * np.abs(x).max()


def test_tables_of_the_largest_grid_keep_float32():
    """704 x 1280, 121 frames: 31 x 22 x 40 tokens."""
    cos_LP, sin_LP = rope_tables((31, 22, 40), 128)
    angle_LP = find_angles((31, 22, 40), 128)
    assert np.abs(cos_LP - np.cos(angle_LP)).max() < 1e-7
    assert np.abs(sin_LP - np.sin(angle_LP)).max() < 1e-7


def test_bfloat16_is_rotated_in_float32_and_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 30, 2, 28)), jnp.bfloat16)
    angles = rope_tables((3, 2, 5), 28)
    got = apply_rope(x, *angles)
    assert got.dtype == jnp.bfloat16
    exact = apply_rope(x.astype(jnp.float32), *angles)
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
    coarse = apply_rope(x.astype(jnp.float32), *(a.astype(jnp.bfloat16) for a in angles))
    assert (got != coarse.astype(jnp.bfloat16)).any()


def rotate(x_BLHK: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    pairs = x_BLHK.astype(np.float64).view(np.complex128)
    turned = pairs * np.exp(1j * find_angles(grid, x_BLHK.shape[-1]))[:, None]
    return turned.view(np.float64)


def find_angles(grid: tuple[int, int, int], head_dim: int) -> np.ndarray:
    """Token by token, in the order of the definition; width runs fastest."""
    side = head_dim // 6
    pairs = (head_dim // 2 - 2 * side, side, side)
    return np.array(
        [
            [
                position / 10000 ** (j / count)
                for position, count in zip(token, pairs, strict=True)
                for j in range(count)
            ]
            for token in np.ndindex(*grid)
        ]
    )
