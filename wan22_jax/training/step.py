"""The train step: from a batch and a seed to the next state.

Every draw is a function of (seed, step, position in the global batch), see ``draws.py``, so that a
resumed run repeats nothing and stores no random state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Float

from wan22_jax.batch import Batch
from wan22_jax.model.block_weights import Arrays, join_linears, named_arrays
from wan22_jax.model.flow import SQUARED, Penalty, add_noise, velocity_loss
from wan22_jax.model.lora import LoRAParam
from wan22_jax.model.remat import POLICIES, Streamed
from wan22_jax.model.transformer import WanTransformer
from wan22_jax.training.blockwise import BlockwiseOptimizer
from wan22_jax.training.draws import TEXT_ALONE, Draws, TaskMix, draw_examples
from wan22_jax.training.full import Weights, merge_full, narrow_gradients

Trainable = nnx.State | Weights  # an adapter, or all weights of the model


class TrainState(NamedTuple):
    """What changes from step to step; the frozen weights are not part of it."""

    step: jax.Array  # int32, steps done
    trainable: Trainable
    opt_state: optax.OptState


@dataclass(frozen=True)
class StepSettings:
    """How a step trains: constants of its compiled program."""

    tasks: TaskMix = TEXT_ALONE
    penalty: Penalty = SQUARED
    activation_checkpointing: bool | str = False  # what the backward pass keeps, remat.POLICIES


class Frozen(NamedTuple):
    """The weights that do not train, where the step reads them; see ``place_frozen``."""

    rest: nnx.State  # all but the blocks, or with them if no parts; all empty if all train
    parts: tuple[list[Arrays] | Streamed, ...] = ()


Optimizer = optax.GradientTransformation | BlockwiseOptimizer
Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def split_model(model: WanTransformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns the structure, the trainable adapter and the frozen rest."""
    graphdef, trainable, frozen = nnx.split(model, LoRAParam, ...)
    return graphdef, trainable, frozen


def place_frozen(
    frozen: nnx.State,
    *,
    activation_checkpointing: bool | str,
    blocks_to_swap: int,
    sharding: Sharding,
) -> Frozen:
    """Puts the frozen weights where and how the step reads them.

    Args:
        frozen: from ``split_model``; arrays of the device or of NumPy.
        activation_checkpointing: a key of ``remat.POLICIES``; says whether activations wait on the
            host.
        blocks_to_swap: so many last blocks keep their matrices in pinned host memory, the rest of
            their weights is small; more than there are means all.
        sharding: of what stays on the device.
    """
    stacked, rest = nnx.split_state(frozen, lambda path, _: path[0] == "blocks", ...)
    by_name = named_arrays(cast(nnx.State, stacked["blocks"]))
    num_blocks = len(by_name["modulation"])
    resident = max(0, num_blocks - blocks_to_swap)
    host = sharding.with_memory_kind("pinned_host")

    def put_row(index: int, *, swap: bool) -> tuple[Arrays, Arrays]:
        row = join_linears({name: array[index] for name, array in by_name.items()})
        matrices = {name for name, array in row.items() if swap and array.ndim == 2}
        return (
            {name: jax.device_put(row[name], sharding) for name in row.keys() - matrices},
            {name: jax.device_put(row[name], host) for name in matrices},
        )

    rows = [put_row(index, swap=index >= resident) for index in range(num_blocks)]
    start = 0 if POLICIES[activation_checkpointing].on_host else resident
    parts: list[list[Arrays] | Streamed] = []
    if start > 0:
        parts.append([on_device for on_device, _ in rows[:start]])
    if start < num_blocks:
        on_device, on_host = map(list, zip(*rows[start:], strict=True))
        parts.append(Streamed(on_device, on_host))
    without_blocks = nnx.merge_state(rest, jax.tree.map(lambda leaf: leaf[:0], stacked))
    return Frozen(jax.device_put(without_blocks, sharding), tuple(parts))


def gather_frozen(frozen: Frozen, sharding: Sharding) -> Frozen:
    """Copies what waits in host memory to the device; to the same values, without streaming."""

    def gather(part: list[Arrays] | Streamed) -> list[Arrays]:
        if isinstance(part, list):
            return part
        on_host = jax.device_put(part.on_host, sharding)
        return [dict(here) | there for here, there in zip(part.on_device, on_host, strict=True)]

    return frozen._replace(parts=tuple(map(gather, frozen.parts)))


def split_seed(seed: int) -> tuple[Array, Array]:
    """Makes a run's two keys: of the adapter's first values and of the examples' draws."""
    lora_key, draw_key = jax.random.split(jax.random.key(seed))
    return lora_key, draw_key


def init_state(trainable: Trainable, optimizer: Optimizer) -> TrainState:
    """Makes the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def loss_fn(
    trainable: Trainable,
    frozen: Frozen,
    latents_BTYXC: Float[Array, "B T Y X C"],
    text_BSE: Float[Array, "B S E"],
    draws: Draws,
    mask_BYX: Float[Array, "B Y X"] | None = None,
    *,
    graphdef: nnx.GraphDef,
    settings: StepSettings,
) -> tuple[Float[Array, ""], Float[Array, " B"]]:
    """The velocity error, mean over examples and of each; ``draws`` has a leading batch axis."""
    if isinstance(trainable, nnx.State):
        model, parts = nnx.merge(graphdef, trainable, frozen.rest), frozen.parts
    else:
        model, rows = merge_full(graphdef, trainable, frozen.rest)
        parts = (rows,)
    clean_BTYXC = latents_BTYXC.astype(jnp.float32)
    noisy_BTYXC = add_noise(clean_BTYXC, draws.noise_TYXC, draws.sigma_T)
    velocity_BTYXC = model(
        noisy_BTYXC,
        draws.sigma_T,
        text_BSE,
        activation_checkpointing=settings.activation_checkpointing,
        parts=parts,
    )
    loss_B = velocity_loss(
        velocity_BTYXC,
        clean_BTYXC,
        draws.noise_TYXC,
        draws.weight_T,
        mask_BYX,
        penalty=settings.penalty,
    )
    return loss_B.mean(), loss_B


def train_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    key: Array,
    sigma_grid: Float[Array, " G"],
    *,
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    settings: StepSettings,
) -> tuple[TrainState, Metrics]:
    """One optimizer step over the accumulated micro-batches.

    Args:
        state: donated by ``compile_train_step``.
        frozen: the base weights, read only.
        batch: see ``Batch``; the gradient is the mean over its accumulation axis.
        key: made from the seed alone; the step number is folded in here.
        sigma_grid: see ``flow.sigma_grid``.
        graphdef: structure of the model, from ``split_model``.
        optimizer: as given to ``init_state``.
        settings: which tasks, which loss, what is kept for the backward pass.

    Returns:
        The next state, and loss, gradient norm and, of each example, "loss_AB", the noise level
        "sigma_AB" of its trained frames and "task_AB" (see ``Draws.task``).
    """
    num_accumulate, batch_size = batch.latents_ABTYXC.shape[:2]
    step_key = jax.random.fold_in(key, state.step)
    grad_fn = jax.value_and_grad(
        partial(loss_fn, graphdef=graphdef, settings=settings), has_aux=True
    )

    def accumulate(
        grads: Any, micro: tuple[Array, Array, Array | None, Array]
    ) -> tuple[Any, tuple[Array, Metrics]]:
        latents_BTYXC, text_BSE, mask_BYX, index = micro
        draws = draw_examples(
            step_key,
            index * batch_size + jnp.arange(batch_size),
            sigma_grid=sigma_grid,
            shape_TYXC=latents_BTYXC.shape[1:],
            tasks=settings.tasks,
        )
        (loss, loss_B), new_grads = grad_fn(
            state.trainable, frozen, latents_BTYXC, text_BSE, draws, mask_BYX
        )
        examples = {"loss_AB": loss_B, "sigma_AB": draws.sigma, "task_AB": draws.task}
        grads = jax.tree.map(lambda a, b: a + b / num_accumulate, grads, new_grads)
        return grads, (loss, examples)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.trainable)
    micros = (*jax.tree.map(jnp.asarray, batch), jnp.arange(num_accumulate))
    if num_accumulate == 1:  # no copy of the gradient
        grads, of_micro = accumulate(zeros, jax.tree.map(lambda micro: micro[0], micros))
        loss_A, examples = jax.tree.map(lambda leaf: leaf[None], of_micro)
        if isinstance(optimizer, BlockwiseOptimizer):
            grads = narrow_gradients(grads, frozen.rest)
    else:
        grads, (loss_A, examples) = jax.lax.scan(accumulate, zeros, micros)
    norm = optax.global_norm(grads)
    if isinstance(optimizer, BlockwiseOptimizer):
        trainable, opt_state = optimizer.step(grads, state.opt_state, state.trainable, norm)
    else:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = cast(Trainable, optax.apply_updates(state.trainable, updates))
    metrics = {"loss": loss_A.mean(), "grad_norm": norm} | examples
    return TrainState(state.step + 1, trainable, opt_state), metrics


def compile_train_step(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    settings: StepSettings,
    *,
    sharding: Sharding,
    opt_shardings: Any = None,
) -> TrainStep:
    """Jits ``train_step`` (state, frozen, batch, key, sigma_grid); compiles once per batch shape.

    The state is donated; explicit output shardings keep the second step from compiling again.
    ``opt_shardings``, a tree of them, says where the optimizer's state lies if not there.
    """
    step = partial(train_step, graphdef=graphdef, optimizer=optimizer, settings=settings)
    opt_shardings = sharding if opt_shardings is None else opt_shardings
    state: Any = TrainState(*cast(Any, (sharding, sharding, opt_shardings)))
    return jax.jit(step, donate_argnums=0, out_shardings=(state, sharding))
