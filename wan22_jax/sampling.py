"""How does noise become latents?

The noise schedules, the two solvers (UniPC and DPM++ 2M) and the text-to-video and image-to-video
loops of Wan2.2's textimage2video.py. Sigma is in [0, 1], 1 = noise; a latent at sigma is
(1 - sigma) * clean + sigma * noise, and the model predicts velocity = noise - clean.

Both solvers are linear: every step mixes a few remembered latents with weights that depend on the
schedule alone. The weights are computed on the host in float64, the mixing runs in float32.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from wan22_jax.model.transformer import WanTransformer
from wan22_jax.sharding import replicated

Solver = Literal["unipc", "dpm++"]
Velocity = Callable[..., jax.Array]  # (latents_BTYXC, sigma_BT, text_BSE) -> velocity_BTYXC

# wan/configs/shared_config.py, sample_neg_prompt
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

_FIRST_SIGMA = {
    "unipc": float(np.float32(0.999)),  # the original's table of 1000 training sigmas ends here
    "dpm++": 1.0,
}

_KEEP_SAMPLE = np.array([1, 0, 0, 0, 0])


def sigma_schedule(solver: Solver, steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the noise levels of a sampling run, bit for bit the original's.

    Returns:
        sigmas, float32 [steps + 1], falling, the last 0: what the solver works with.
        timesteps, int64 [steps], 1000 * sigma cut to an integer: what the model is told.

    Raises:
        ValueError: unknown solver, fewer than one step, or a shift that is not positive.
    """
    if solver not in _FIRST_SIGMA:
        raise ValueError(f"solver is 'unipc' or 'dpm++', not {solver!r}")
    if steps < 1 or not shift > 0:
        raise ValueError(f"expected steps >= 1 and shift > 0, got {steps} and {shift}")
    sigmas = np.linspace(_FIRST_SIGMA[solver], 0, steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return sigmas.astype(np.float32), (sigmas[:-1] * 1000).astype(np.int64)


def sample_latents(
    model: Velocity,
    text: jax.Array | np.ndarray,
    negative: jax.Array | np.ndarray | None,
    *,
    shape: tuple[int, int, int, int, int],
    solver: Solver,
    steps: int,
    shift: float,
    guidance: float,
    key: jax.Array | None,
    noise: jax.Array | np.ndarray | None = None,
    first_frame: jax.Array | np.ndarray | None = None,
    on_step: Callable[[], object] | None = None,
    paired: bool = False,
) -> jax.Array:
    """Draws clean latents [B, T, Y, X, C] in float32: text-to-video, or image-to-video.

    With `first_frame` latent frame 0 is that frame from beginning to end and the model is told
    sigma 0 for it, which is all that image-to-video is.

    Args:
        model: the velocity; a Flax NNX module is compiled once, with its weights as an argument,
            any other callable is called as it is.
        text: embeddings [B, S, E] of the prompts.
        negative: embeddings [B, S, E] of what to move away from; unused when guidance is 1.
        shape: of the latents, (B, T, Y, X, C).
        solver: 'unipc' or 'dpm++'.
        steps: solver steps, each of two model calls (one when guidance is 1).
        shift: warps the schedule towards noise; 5 is the model's own.
        guidance: velocity = negative + guidance * (text - negative); at 1 that is the text's alone.
        key: draws the noise; unused when `noise` is given.
        noise: the latents to start from, of `shape`.
        first_frame: normalised VAE latents [B or 1, 1, Y, X, C] of the picture to start from.
        on_step: is called when the device has finished a step, to show progress.
        paired: make both model calls of a step in one of twice the batch; texts are equally long.
    """
    sigmas, timesteps = sigma_schedule(solver, steps, shift)
    predict, sharding = _compile(model)
    text = jnp.asarray(text)
    negative = None if negative is None else jnp.asarray(negative)
    if noise is None:
        if key is None:
            raise ValueError("give a key to draw noise from, or the noise itself")
        noise = jax.random.normal(key, shape, jnp.float32)
    sample = jnp.asarray(noise, jnp.float32)
    if sample.shape != tuple(shape):
        raise ValueError(f"noise has shape {sample.shape}, not {tuple(shape)}")
    sigma_scale_T = np.ones(shape[1])
    if first_frame is not None:
        first_frame = jnp.broadcast_to(
            jnp.asarray(first_frame, jnp.float32), (shape[0], 1, *shape[2:])
        )
        sample = sample.at[:, :1].set(first_frame)
        sigma_scale_T[0] = 0
    memory = _Memory(sample, *(jnp.zeros_like(sample) for _ in range(3)))

    for step in range(steps):
        sigma_T = (timesteps[step] / 1000 * sigma_scale_T).astype(np.float32)
        sigma_BT = jnp.broadcast_to(sigma_T, shape[:2])
        sample = jax.device_put(memory.sample, sharding)  # or a later step would compile again
        if guidance == 1:
            velocity = jnp.asarray(predict(sample, sigma_BT, text), jnp.float32)
        else:
            inputs = (sample, sigma_BT, text), (sample, sigma_BT, negative)
            velocity, away = (_predict_together if paired else _predict_in_turn)(predict, *inputs)
            velocity = away + guidance * (velocity - away)
        weights = solver_weights(solver, sigmas, step)
        memory = _advance(memory, velocity, sigmas[step], weights, first_frame)
        if on_step is not None:
            jax.block_until_ready(memory.sample)
            on_step()
    return memory.sample


def _predict_in_turn(predict: Velocity, *inputs: tuple) -> Iterator[jax.Array]:
    return (jnp.asarray(predict(*each), jnp.float32) for each in inputs)


def _predict_together(predict: Velocity, *inputs: tuple) -> list[jax.Array]:
    joined = (jnp.concatenate(parts) for parts in zip(*inputs, strict=True))
    return jnp.split(jnp.asarray(predict(*joined), jnp.float32), len(inputs))


class StepWeights(NamedTuple):
    """One solver step as two weighted sums over what is remembered; clean_i is step i's x0."""

    # float32 [5], of: sample, corrected_{i-1}, clean_{i-2}, clean_{i-1}, clean_i
    correct: jax.Array
    # float32 [3], of: corrected_i, clean_{i-1}, clean_i
    predict: jax.Array


def solver_weights(solver: Solver, sigmas: np.ndarray, step: int) -> StepWeights:
    """Computes the weights of one step from the schedule, in float64."""
    sigmas = sigmas.astype(np.float64)
    with np.errstate(divide="ignore"):  # lambda is -inf at sigma 1 and +inf at sigma 0
        log_snr = np.log(1 - sigmas) - np.log(sigmas)
    is_edge = step in (0, len(sigmas) - 2)  # first and last step are first order
    if solver == "unipc":
        correct = _correct_unipc(sigmas, log_snr, step)
        predict = _predict_unipc(sigmas, log_snr, step, order=1 if is_edge else 2)
    else:
        correct = _KEEP_SAMPLE
        predict = _predict_dpm(sigmas, log_snr, step, order=1 if is_edge else 2)
    return StepWeights(jnp.asarray(correct, jnp.float32), jnp.asarray(predict, jnp.float32))


class _Memory(NamedTuple):
    sample: jax.Array  # what the model sees next
    corrected: jax.Array  # the last sample after its correction
    clean: jax.Array  # the last two predictions of the clean latents
    clean_before: jax.Array


@jax.jit
def _advance(
    memory: _Memory,
    velocity: jax.Array,
    sigma: jax.Array,
    weights: StepWeights,
    first_frame: jax.Array | None,
) -> _Memory:
    clean = memory.sample - sigma * velocity
    corrected = _mix(
        weights.correct,
        (memory.sample, memory.corrected, memory.clean_before, memory.clean, clean),
    )
    sample = _mix(weights.predict, (corrected, memory.clean, clean))
    if first_frame is not None:  # the sample only: the solver remembers its own frame 0
        sample = sample.at[:, :1].set(first_frame)
    return _Memory(sample, corrected, clean, memory.clean)


def _mix(weights: jax.Array, arrays: tuple[jax.Array, ...]) -> jax.Array:
    # Not a dot: that may run in TF32.
    return jnp.sum(jnp.stack([w * a for w, a in zip(weights, arrays, strict=True)]), axis=0)


def _correct_unipc(sigmas: np.ndarray, log_snr: np.ndarray, step: int) -> np.ndarray:
    """UniC of the order that the previous prediction had (Zhao et al. 2023, B2 = e^h - 1)."""
    if step == 0:
        return _KEEP_SAMPLE
    keep, scale, shrink, width = _interval(sigmas, log_snr, step - 1)
    if step == 1:
        return np.array([0, keep, 0, -scale / 2, -scale / 2])
    ratio = (log_snr[step - 2] - log_snr[step - 1]) / width
    remainder = shrink / -width - 1
    first, second = np.linalg.solve(
        [[1, 1], [ratio, 1]], [remainder / shrink, 2 * (remainder / -width - 0.5) / shrink]
    )
    first = first / ratio
    return np.array([0, keep, -scale * first, -scale * (1 - first - second), -scale * second])


def _predict_unipc(sigmas: np.ndarray, log_snr: np.ndarray, step: int, *, order: int) -> np.ndarray:
    keep, scale, _, width = _interval(sigmas, log_snr, step)
    if order == 1:
        return np.array([keep, 0, -scale])
    ratio = (log_snr[step - 1] - log_snr[step]) / width
    return np.array([keep, -scale * 0.5 / ratio, -scale * (1 - 0.5 / ratio)])


def _predict_dpm(sigmas: np.ndarray, log_snr: np.ndarray, step: int, *, order: int) -> np.ndarray:
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022)."""
    keep, scale, _, width = _interval(sigmas, log_snr, step)
    if order == 1:
        return np.array([keep, 0, -scale])
    ratio = (log_snr[step] - log_snr[step - 1]) / width  # inf at step 1, where sigma 1 came before
    return np.array([keep, scale * 0.5 / ratio, -scale * (1 + 0.5 / ratio)])


def _interval(
    sigmas: np.ndarray, log_snr: np.ndarray, step: int
) -> tuple[float, float, float, float]:
    """From sigma_i to sigma_{i+1}: what is kept of the sample, alpha * E, E = e^-h - 1, and h."""
    width = log_snr[step + 1] - log_snr[step]
    shrink = np.expm1(-width)
    return sigmas[step + 1] / sigmas[step], (1 - sigmas[step + 1]) * shrink, shrink, width


def _compile(model: Velocity) -> tuple[Velocity, Sharding | None]:
    """Also returns where latents live that come out of the model: wherever its weights do."""
    if not isinstance(model, nnx.Module):
        return model, None
    graphdef, state = nnx.split(model)
    sharding = jax.tree.leaves(state)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        sharding = replicated(sharding.mesh)
    return partial(_run_module, graphdef, state), sharding


@partial(jax.jit, static_argnums=0)
def _run_module(graphdef: nnx.GraphDef, state: Any, *inputs: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    if isinstance(model, WanTransformer):
        return model(*inputs, float32_residual=True, differentiable=False)  # as the original
    return model(*inputs)
