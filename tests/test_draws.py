"""What chance adds to a clip: the same as ever, and frames are given as the config says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan22_jax.model.flow import sigma_grid
from wan22_jax.training.draws import Draws, TaskMix, draw_examples
from wan22_jax.training.step import split_seed

GRID = jnp.asarray(sigma_grid())
STEP_KEY = jax.random.fold_in(split_seed(5)[1], 7)
# Recorded before the dial had more than its first key.
RECORDED_SIGMA = [
    0.525870144367218,
    0.398495614528656,
    0.8972924947738647,
    0.5900503396987915,
    0.3484291434288025,
    0.4107268154621124,
    0.4306597113609314,
    0.6227719783782959,
]
RECORDED_I2V = [1, 1, 0, 0, 1, 0, 1, 1]
RECORDED_NOISE = [
    -0.13289197, 0.09930334, 1.1271201, -1.331185, 1.818023, -0.30721256, -1.4626225, 0.98962708
]  # fmt: skip


def draw(tasks: TaskMix, *, frames: int = 3, count: int = 8) -> Draws:
    return jax.jit(
        lambda key: draw_examples(
            key,
            jnp.arange(count),
            sigma_grid=GRID,
            shape_TYXC=(frames, 2, 2, 4),
            tasks=tasks,
        )
    )(STEP_KEY)


def given(draws: Draws) -> set[str]:
    """Which frames were given, as 1 and 0, of examples of which some were."""
    return {
        "".join("1" if weight == 0 else "0" for weight in weight_T)
        for weight_T in np.asarray(draws.weight_T)
        if (weight_T == 0).any()
    }


def test_draws_are_those_of_earlier_versions():
    draws = draw(TaskMix(0.5))
    np.testing.assert_array_equal(draws.sigma, np.float32(RECORDED_SIGMA))
    np.testing.assert_array_equal(draws.sigma_T[:, 1], draws.sigma)
    np.testing.assert_array_equal(draws.task, RECORDED_I2V)
    np.testing.assert_array_equal(draws.sigma_T[:, 0] == 0, RECORDED_I2V)
    np.testing.assert_allclose(draws.noise_TYXC[:, -1, 0, 0, 0], RECORDED_NOISE, rtol=1e-6)


@pytest.mark.parametrize(
    "tasks", [TaskMix(0.5, (2,)), TaskMix(0.5, (1, 2, 3)), TaskMix(0.5, (1, 4), 0.5)]
)
def test_given_frames_change_no_other_draw(tasks):
    plain, other = draw(TaskMix(0.5), frames=6), draw(tasks, frames=6)
    np.testing.assert_array_equal(plain.noise_TYXC, other.noise_TYXC)
    np.testing.assert_array_equal(plain.sigma, other.sigma)
    np.testing.assert_array_equal(plain.task, other.task)
    assert np.any(plain.weight_T != other.weight_T)
    np.testing.assert_array_equal(
        other.sigma_T, np.where(np.asarray(other.weight_T) == 0, 0, plain.sigma[:, None])
    )


def test_number_of_first_frames_is_drawn_evenly_and_for_each_example():
    draws = draw(TaskMix(1.0, (1, 2, 4)), frames=6, count=3000)
    assert given(draws) == {"100000", "110000", "111100"}
    count_B = np.asarray(draws.weight_T == 0).sum(axis=1)
    shares = [(count_B == count).mean() for count in (1, 2, 4)]
    np.testing.assert_allclose(shares, 1 / 3, atol=4 * (2 / 9 / 3000) ** 0.5)
    assert given(draw(TaskMix(1.0, (3,)), frames=6)) == {"111000"}


def test_share_of_last_frames_is_of_the_image_to_video_examples():
    draws = draw(TaskMix(0.5, (1,), 0.25), frames=4, count=4000)
    assert given(draws) == {"1000", "1001"}
    is_given = np.asarray(draws.weight_T) == 0
    i2v = is_given[:, 0]
    assert abs(i2v.mean() - 0.5) < 4 * (0.25 / 4000) ** 0.5
    assert abs(is_given[i2v, -1].mean() - 0.25) < 4 * (0.1875 / 2000) ** 0.5
    assert not is_given[~i2v].any()


@pytest.mark.parametrize(
    ("frames", "expected"),
    [(1, set()), (2, {"10"}), (3, {"101", "110"}), (4, {"1101", "1110"}), (5, {"11101", "11100"})],
)
def test_one_frame_at_least_is_trained(frames, expected):
    draws = draw(TaskMix(1.0, (3,), 0.5), frames=frames, count=64)
    assert given(draws) == expected
    assert np.all(np.asarray(draws.sigma) > 0)
    assert np.all(np.asarray(draws.weight_T).sum(axis=1) >= 1)
    np.testing.assert_array_equal(draws.task, int(frames > 1))
