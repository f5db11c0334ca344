"""What does chance add to a clip: noise, its level, and which frames are given instead of trained?

Every draw is a function of (seed, step, position in the global batch) and of nothing else.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wan22_jax.model.flow import sample_sigma

TEXT_TO_VIDEO, IMAGE_TO_VIDEO = 0, 1  # what ``Draws.task`` says
# Fold into the task's key, so that draws that came later leave the earlier ones as they were.
_COUNT, _LAST = 1, 2


@dataclass(frozen=True)
class TaskMix:
    """How often frames of an example are given, and which.

    Attributes:
        i2v_fraction: share of the examples that train image-to-video: their first latent frames
            stay clean. The rest trains text-to-video.
        first_frames: how many frames are given, one number drawn for each of these examples.
        last_frame_fraction: share of the image-to-video examples whose last frame is given too.
    """

    i2v_fraction: float = 0.0
    first_frames: tuple[int, ...] = (1,)
    last_frame_fraction: float = 0.0


TEXT_ALONE = TaskMix()


class Draws(NamedTuple):
    """What one training example adds to its clip."""

    noise_TYXC: Float[Array, "T Y X C"]
    sigma_T: Float[Array, " T"]  # 0 on a given frame
    weight_T: Float[Array, " T"]  # 1 on frames that are trained, 0 on a given frame

    @property
    def sigma(self) -> Array:
        """Noise level of the frames that are trained; with leading axes, of each example."""
        return jnp.max(self.sigma_T, axis=-1)

    @property
    def task(self) -> Array:
        """TEXT_TO_VIDEO or, where a frame is given, IMAGE_TO_VIDEO; int32, as ``sigma``."""
        is_given = jnp.any(self.weight_T == 0, axis=-1)
        return jnp.where(is_given, IMAGE_TO_VIDEO, TEXT_TO_VIDEO).astype(jnp.int32)


def draw_example(
    key: Array,
    *,
    sigma_grid: Float[Array, " G"],
    shape_TYXC: tuple[int, ...],
    tasks: TaskMix,
) -> Draws:
    """Draws noise level, noise and task of one example.

    An image-to-video example trains as the model is used for it (spec 4.5): the given latent
    frames stay clean, their sigma is 0 and they are left out of the loss. One frame at least is
    trained: a clip too short for all that was drawn gives fewer first frames, one of two frames no
    last one, and an image is always text-to-image.
    """
    sigma_key, noise_key, task_key = jax.random.split(key, 3)
    num_frames = shape_TYXC[0]
    fraction = tasks.i2v_fraction if num_frames > 1 else 0.0
    is_i2v = jax.random.uniform(task_key) < fraction
    is_given_T = _draw_given(task_key, num_frames, tasks) & is_i2v
    weight_T = jnp.where(is_given_T, 0.0, 1.0)
    return Draws(
        noise_TYXC=jax.random.normal(noise_key, shape_TYXC, jnp.float32),
        sigma_T=weight_T * sample_sigma(sigma_grid, sigma_key),
        weight_T=weight_T,
    )


def draw_examples(
    step_key: Array,
    positions_B: Int[Array, " B"],
    *,
    sigma_grid: Float[Array, " G"],
    shape_TYXC: tuple[int, ...],
    tasks: TaskMix,
) -> Draws:
    """Draws the examples at some positions of a step's global batch, see ``draw_example``.

    Args:
        step_key: ``fold_in`` of ``split_seed``'s second key and the step, counted from 0.
        positions_B: of each example, counted over the accumulated micro-batches.
        sigma_grid: see ``flow.sigma_grid``.
        shape_TYXC: of the latents.
        tasks: how often which frames are given.
    """
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, positions_B)
    draw = partial(draw_example, sigma_grid=sigma_grid, shape_TYXC=shape_TYXC, tasks=tasks)
    return jax.vmap(draw)(keys_B)


def _draw_given(task_key: Array, num_frames: int, tasks: TaskMix) -> Array:
    """Says of each frame whether it is given if the example is image-to-video."""
    has_last = jnp.zeros((), bool)
    if tasks.last_frame_fraction > 0 and num_frames > 2:
        drawn = jax.random.uniform(jax.random.fold_in(task_key, _LAST))
        has_last = drawn < tasks.last_frame_fraction
    counts = jnp.asarray(tasks.first_frames)
    if len(tasks.first_frames) > 1:
        key = jax.random.fold_in(task_key, _COUNT)
        count = counts[jax.random.randint(key, (), 0, len(tasks.first_frames))]
    else:
        count = counts[0]
    count = jnp.minimum(count, num_frames - 1 - has_last)
    frames_T = jnp.arange(num_frames)
    return (frames_T < count) | (has_last & (frames_T == num_frames - 1))
