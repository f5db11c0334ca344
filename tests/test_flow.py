"""Noise levels and the flow line, against values measured on diffusion-pipe's own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan22_jax.model.flow import add_noise, flux_shift, sample_sigma, sigma_grid, velocity_loss

DECILES = np.arange(0.1, 0.91, 0.1)


def at(grid: np.ndarray, quantiles) -> np.ndarray:
    return np.array([grid[int(q * len(grid) + 1e-9)] for q in np.atleast_1d(quantiles)])


def test_logit_normal_quantiles():
    grid = sigma_grid()
    expected = [0.2174, 0.3013, 0.3719, 0.4370, 0.5000, 0.5630, 0.6282, 0.6988, 0.7827]
    np.testing.assert_allclose(at(grid, DECILES), expected, atol=6e-5)
    np.testing.assert_allclose([grid[0], grid[-1]], [0.02368, 0.97632], atol=1e-5)
    np.testing.assert_allclose([grid.mean(), grid.std()], [0.5, 0.2082], atol=1e-4)
    assert grid.dtype == np.float32


def test_sigmoid_scale_shift_and_slice():
    expected = [0.1277, 0.2206, 0.3130, 0.4062, 0.5, 0.5939, 0.6871, 0.7795, 0.8724]
    np.testing.assert_allclose(at(sigma_grid(sigmoid_scale=1.5), DECILES), expected, atol=6e-5)
    for shift, expected in (
        (3.0, [0.4545, 0.7500, 0.9153]),
        (5.0, [0.5814, 0.8334, 0.9474]),
        (12.0, [0.7692, 0.9231, 0.9774]),
    ):
        np.testing.assert_allclose(
            at(sigma_grid(shift=shift), [0.1, 0.5, 0.9]), expected, atol=6e-5
        )
    assert len(sigma_grid(min_t=0.875)) == 258
    assert sigma_grid(min_t=0.875).min() >= 0.875


def test_uniform_and_refusals():
    grid = sigma_grid(method="uniform")
    np.testing.assert_allclose([grid[0], grid[-1], grid.mean()], [1e-4, 1 - 1e-4, 0.5], atol=1e-6)
    with pytest.raises(ValueError, match="no sigma lies"):
        sigma_grid(min_t=0.99)
    with pytest.raises(ValueError, match="logit_normal or uniform"):
        sigma_grid(method="cosine")


def test_flux_shift_of_a_720p_frame():
    np.testing.assert_allclose(np.log(flux_shift(880)), 0.6056, atol=1e-4)


def test_sampled_sigmas_cover_the_grid_uniformly():
    grid = jnp.asarray(sigma_grid())
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda key: sample_sigma(grid, key))(keys))
    assert np.isin(drawn, np.asarray(grid)).all()
    np.testing.assert_allclose(
        np.quantile(drawn, DECILES), at(np.asarray(grid), DECILES), atol=0.02
    )


def test_line_from_data_to_noise():
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 1, 3, 2, 2, 4)).astype(np.float32)
    sigma = jnp.asarray([[0.0, 1.0, 0.25]])
    mixed = np.asarray(add_noise(jnp.asarray(clean), jnp.asarray(noise), sigma))
    np.testing.assert_array_equal(mixed[0, 0], clean[0, 0])
    np.testing.assert_array_equal(mixed[0, 1], noise[0, 1])
    np.testing.assert_allclose(mixed[0, 2], 0.75 * clean[0, 2] + 0.25 * noise[0, 2], rtol=1e-6)


def test_loss_leaves_out_frames_of_weight_zero():
    clean, noise = jnp.zeros((1, 2, 2, 2, 4)), jnp.ones((1, 2, 2, 2, 4))
    velocity = noise.at[:, 1].add(2.0).at[:, 0].add(100.0)
    assert velocity_loss(velocity, clean, noise, jnp.asarray([[0.0, 1.0]]))[0] == 4.0
    assert velocity_loss(velocity, clean, noise, jnp.ones((1, 2)))[0] == (4.0 + 1e4) / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_loss_against_float64(dtype):
    """Mask times squared error, over the count of all elements of the trained frames."""
    rng = np.random.default_rng(0)
    velocity, clean, noise = rng.normal(size=(3, 2, 3, 4, 6, 5)).astype(np.float32)
    weight_BT = np.array([[1, 1, 1], [0, 1, 1]], np.float32)  # one example of each task
    mask_BYX = rng.integers(0, 5, (2, 4, 6)) / 4
    expected = np.zeros(2)
    for b, t, y, x, c in np.ndindex(velocity.shape):
        error = np.float64(velocity[b, t, y, x, c]) - (
            np.float64(noise[b, t, y, x, c]) - np.float64(clean[b, t, y, x, c])
        )
        expected[b] += weight_BT[b, t] * mask_BYX[b, y, x] * error**2
    expected /= weight_BT.sum(axis=1) * 4 * 6 * 5
    args = (clean, noise, weight_BT)
    mask = jnp.asarray(mask_BYX, dtype)
    got_B = velocity_loss(jnp.asarray(velocity), *map(jnp.asarray, args), mask)
    assert got_B.dtype == jnp.float32
    np.testing.assert_allclose(got_B, expected, rtol=1e-5)
    plain_B = velocity_loss(jnp.asarray(velocity), *map(jnp.asarray, args))
    assert np.all(np.abs(got_B / plain_B - 1) > 0.1)  # the mask acts
    ones_B = velocity_loss(jnp.asarray(velocity), *map(jnp.asarray, args), jnp.ones_like(mask))
    np.testing.assert_array_equal(ones_B, plain_B)


def test_gradient_is_zero_where_the_mask_is():
    rng = np.random.default_rng(1)
    velocity, clean, noise = jnp.asarray(rng.normal(size=(3, 1, 2, 4, 6, 5)), jnp.float32)
    mask_BYX = jnp.asarray(rng.integers(0, 2, (1, 4, 6)), jnp.float32)
    gradient = jax.grad(
        lambda velocity: velocity_loss(velocity, clean, noise, jnp.ones((1, 2)), mask_BYX)[0]
    )(velocity)
    is_zero = np.all(np.asarray(gradient) == 0, axis=(1, 4))
    np.testing.assert_array_equal(is_zero, mask_BYX == 0)
    assert np.any(is_zero)
    assert not np.all(is_zero)
