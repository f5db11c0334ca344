"""The train step: from a batch and a seed to the next state.

Every draw is a function of (seed, step, position in the global batch), see ``draws.py``, so that a
resumed run repeats nothing and stores no random state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Float

from wan22_jax.batch import Batch
from wan22_jax.model.block_weights import Arrays, join_linears, named_arrays
from wan22_jax.model.flow import SQUARED, Penalty, add_noise, velocity_loss
from wan22_jax.model.lora import Dropout, LoRAParam
from wan22_jax.model.remat import POLICIES, Streamed
from wan22_jax.model.transformer import WanTransformer
from wan22_jax.training.draws import TEXT_ALONE, Draws, TaskMix, draw_dropout, draw_examples
from wan22_jax.training.optimizer_options import optimizer_metrics


class TrainState(NamedTuple):
    """What changes from step to step; the frozen weights are not part of it."""

    step: jax.Array  # int32, steps done
    trainable: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None = None  # the average of trainable over the steps, float32


@dataclass(frozen=True)
class StepSettings:
    """How a step trains: constants of its compiled program."""

    tasks: TaskMix = TEXT_ALONE
    penalty: Penalty = SQUARED
    activation_checkpointing: bool | str = False  # what the backward pass keeps, remat.POLICIES
    skip_nonfinite: bool = False  # a loss or gradient that is not changes the step number alone
    lora_dropout: float = 0.0
    ema_decay: float = 0.0  # what the average keeps of itself at each step; 0 for none


class Frozen(NamedTuple):
    """The weights that do not train, where the step reads them; see ``place_frozen``."""

    rest: nnx.State  # all but the blocks, or with them if there are no parts
    parts: tuple[list[Arrays] | Streamed, ...] = ()


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


def init_state(
    trainable: nnx.State, optimizer: optax.GradientTransformation, *, ema_decay: float = 0.0
) -> TrainState:
    """Makes the state before the first step, with an average if there is a decay."""
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    return state._replace(ema=start_ema(trainable)) if ema_decay > 0 else state


def start_ema(trainable: nnx.State) -> nnx.State:
    """Copies weights to average from: a decay near 1 would be lost in 16 bits."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trainable)


def update_ema(ema: nnx.State, trainable: nnx.State, *, decay: float) -> nnx.State:
    """Returns decay * ema + (1 - decay) * trainable, leaf by leaf."""
    return jax.tree.map(
        lambda old, new: old + (1 - decay) * (new.astype(jnp.float32) - old), ema, trainable
    )


def loss_fn(
    trainable: nnx.State,
    frozen: Frozen,
    latents_BTYXC: Float[Array, "B T Y X C"],
    text_BSE: Float[Array, "B S E"],
    draws: Draws,
    mask_BYX: Float[Array, "B Y X"] | None = None,
    dropout: Dropout | None = None,
    *,
    graphdef: nnx.GraphDef,
    settings: StepSettings,
) -> tuple[Float[Array, ""], Float[Array, " B"]]:
    """The velocity error, mean over examples and of each; ``draws`` has a leading batch axis."""
    model = nnx.merge(graphdef, trainable, frozen.rest)
    clean_BTYXC = latents_BTYXC.astype(jnp.float32)
    noisy_BTYXC = add_noise(clean_BTYXC, draws.noise_TYXC, draws.sigma_T)
    velocity_BTYXC = model(
        noisy_BTYXC,
        draws.sigma_T,
        text_BSE,
        activation_checkpointing=settings.activation_checkpointing,
        parts=frozen.parts,
        dropout=dropout,
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
    optimizer: optax.GradientTransformation,
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
        grads: nnx.State, micro: tuple[Array, Array, Array | None, Array]
    ) -> tuple[nnx.State, tuple[Array, Metrics]]:
        latents_BTYXC, text_BSE, mask_BYX, index = micro
        positions_B = index * batch_size + jnp.arange(batch_size)
        draws = draw_examples(
            step_key,
            positions_B,
            sigma_grid=sigma_grid,
            shape_TYXC=latents_BTYXC.shape[1:],
            tasks=settings.tasks,
        )
        (loss, loss_B), new_grads = grad_fn(
            state.trainable,
            *(frozen, latents_BTYXC, text_BSE, draws, mask_BYX),
            draw_dropout(step_key, positions_B, rate=settings.lora_dropout),
        )
        examples = {"loss_AB": loss_B, "sigma_AB": draws.sigma, "task_AB": draws.task}
        grads = jax.tree.map(lambda a, b: a + b / num_accumulate, grads, new_grads)
        return grads, (loss, examples)

    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    micros = (*jax.tree.map(jnp.asarray, batch), jnp.arange(num_accumulate))
    if num_accumulate == 1:  # no copy of the gradient
        grads, of_micro = accumulate(zeros, jax.tree.map(lambda micro: micro[0], micros))
        loss_A, examples = jax.tree.map(lambda leaf: leaf[None], of_micro)
    else:
        grads, (loss_A, examples) = jax.lax.scan(accumulate, zeros, micros)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = cast(nnx.State, optax.apply_updates(state.trainable, updates))
    metrics = {"loss": loss_A.mean(), "grad_norm": optax.global_norm(grads)} | examples
    metrics |= optimizer_metrics(opt_state)
    ema = state.ema
    if ema is not None:
        ema = update_ema(ema, trainable, decay=settings.ema_decay)
    new_state = TrainState(state.step + 1, trainable, opt_state, ema)
    if settings.skip_nonfinite:
        is_sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(partial(jnp.where, is_sound), new_state, state)
        new_state = kept._replace(step=new_state.step)
    return new_state, metrics


def compile_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    *,
    sharding: Sharding,
) -> TrainStep:
    """Jits ``train_step`` (state, frozen, batch, key, sigma_grid); compiles once per batch shape.

    The state is donated; explicit output shardings keep the second step from compiling again.
    """
    step = partial(train_step, graphdef=graphdef, optimizer=optimizer, settings=settings)
    return jax.jit(step, donate_argnums=0, out_shardings=sharding)
