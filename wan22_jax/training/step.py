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
from jax.sharding import Mesh
from jaxtyping import Array, Float

from wan22_jax.batch import Batch
from wan22_jax.model.flow import SQUARED, Penalty, add_noise, velocity_loss
from wan22_jax.model.lora import Dropout, LoRAParam
from wan22_jax.model.shards import AXES, CONTEXT, DATA, FSDP, ONE_DEVICE, Shards, is_split
from wan22_jax.model.transformer import WanTransformer
from wan22_jax.sharding import of_examples, replicated, shards_of, specs_of
from wan22_jax.training.blockwise import BlockwiseOptimizer
from wan22_jax.training.draws import TEXT_ALONE, Draws, TaskMix, draw_dropout, draw_examples
from wan22_jax.training.ema import start_ema, update_ema
from wan22_jax.training.frozen import Frozen
from wan22_jax.training.full import Trainable, merge_model, narrow_gradients
from wan22_jax.training.optimizer_options import optimizer_metrics
from wan22_jax.weights import is_stacked


class TrainState(NamedTuple):
    """What changes from step to step; the frozen weights are not part of it."""

    step: jax.Array  # int32, steps done
    trainable: Trainable
    opt_state: optax.OptState
    ema: Trainable | None = None  # the average of trainable over the steps, float32


@dataclass(frozen=True)
class StepSettings:
    """How a step trains: constants of its compiled program."""

    tasks: TaskMix = TEXT_ALONE
    penalty: Penalty = SQUARED
    activation_checkpointing: bool | str = False  # what the backward pass keeps, remat.POLICIES
    skip_nonfinite: bool = False  # a loss or gradient that is not changes the step number alone
    lora_dropout: float = 0.0
    ema_decay: float = 0.0  # what the average keeps of itself at each step; 0 for none


class Divided(NamedTuple):
    """How devices share a step: their mesh, and the partition of each weight."""

    mesh: Mesh
    trainable: Any
    frozen: Any


Optimizer = optax.GradientTransformation | BlockwiseOptimizer
Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def split_model(model: WanTransformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns the structure, the trainable adapter and the frozen rest."""
    graphdef, trainable, frozen = nnx.split(model, LoRAParam, ...)
    return graphdef, trainable, frozen


def split_seed(seed: int) -> tuple[Array, Array]:
    """Makes a run's two keys: of the adapter's first values and of the examples' draws."""
    lora_key, draw_key = jax.random.split(jax.random.key(seed))
    return lora_key, draw_key


def init_state(trainable: Trainable, optimizer: Optimizer, *, ema_decay: float = 0.0) -> TrainState:
    """Makes the state before the first step, with an average if there is a decay."""
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    return state._replace(ema=start_ema(trainable)) if ema_decay > 0 else state


def loss_fn(
    trainable: Trainable,
    frozen: Frozen,
    latents_BTYXC: Float[Array, "B T Y X C"],
    text_BSE: Float[Array, "B S E"],
    draws: Draws,
    mask_BYX: Float[Array, "B Y X"] | None = None,
    dropout: Dropout | None = None,
    *,
    graphdef: nnx.GraphDef,
    settings: StepSettings,
    shards: Shards = ONE_DEVICE,
) -> tuple[Float[Array, ""], Float[Array, " B"]]:
    """The velocity error, mean over examples and of each; ``draws`` has a leading batch axis."""
    model, parts = merge_model(graphdef, trainable, frozen)
    clean_BTYXC = latents_BTYXC.astype(jnp.float32)
    noisy_BTYXC = add_noise(clean_BTYXC, draws.noise_TYXC, draws.sigma_T)
    velocity_BTYXC = model(
        noisy_BTYXC,
        draws.sigma_T,
        text_BSE,
        activation_checkpointing=settings.activation_checkpointing,
        parts=parts,
        dropout=dropout,
        shards=shards,
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
    divided: Divided | None = None,
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
        divided: how several devices share the work: each computes gradients on its examples (axes
            "data" and "fsdp") and its tokens of them ("context"), then all update together.

    Returns:
        The next state, and loss, gradient norm and, of each example, "loss_AB", the noise level
        "sigma_AB" of its trained frames and "task_AB" (see ``Draws.task``).
    """
    step_key = jax.random.fold_in(key, state.step)
    gradients = partial(compute_gradients, graphdef=graphdef, settings=settings)
    if divided is not None:
        everywhere, examples = replicated(divided.mesh).spec, of_examples(divided.mesh).spec
        gradients = jax.shard_map(
            partial(gradients, mesh=divided.mesh),
            mesh=divided.mesh,
            in_specs=(divided.trainable, divided.frozen, examples, everywhere, everywhere),
            out_specs=(divided.trainable, examples),
            check_vma=False,
        )
    grads, examples = gradients(state.trainable, frozen, batch, step_key, sigma_grid)
    if isinstance(optimizer, BlockwiseOptimizer) and len(examples["loss_AB"]) == 1:
        grads = narrow_gradients(grads, frozen.rest)
    norm = optax.global_norm(grads)
    if isinstance(optimizer, BlockwiseOptimizer):
        trainable, opt_state = optimizer.step(grads, state.opt_state, state.trainable, norm)
    else:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = cast(Trainable, optax.apply_updates(state.trainable, updates))
    loss = examples["loss_AB"].mean(axis=1).mean()
    metrics = {"loss": loss, "grad_norm": norm} | examples | optimizer_metrics(opt_state)
    ema = state.ema
    if ema is not None:
        ema = update_ema(ema, trainable, decay=settings.ema_decay)
    new_state = TrainState(state.step + 1, trainable, opt_state, ema)
    if settings.skip_nonfinite:
        is_sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(partial(jnp.where, is_sound), new_state, state)
        new_state = kept._replace(step=new_state.step)
    return new_state, metrics


def compute_gradients(
    trainable: Trainable,
    frozen: Frozen,
    batch: Batch,
    step_key: Array,
    sigma_grid: Float[Array, " G"],
    *,
    graphdef: nnx.GraphDef,
    settings: StepSettings,
    mesh: Mesh | None = None,
) -> tuple[Any, Metrics]:
    """The mean gradient over the micro-batches, float32, and the examples' metrics [A, B].

    Args:
        trainable: what it is the gradient of.
        frozen: the base weights.
        batch: the examples that are here.
        step_key: of all devices.
        sigma_grid: see ``flow.sigma_grid``.
        graphdef: structure of the model, from ``split_model``.
        settings: see there.
        mesh: of the devices that compute this together, inside of a shard_map over all its axes.
    """
    num_accumulate, batch_size = batch.latents_ABTYXC.shape[:2]
    shards, first, num_examples = ONE_DEVICE, 0, batch_size
    if mesh is not None:
        shards = shards_of(mesh)
        first = batch_size * jax.lax.axis_index((DATA, FSDP))
        num_examples = batch_size * mesh.shape[DATA] * mesh.shape[FSDP]
    grad_fn = jax.value_and_grad(
        partial(loss_fn, graphdef=graphdef, settings=settings, shards=shards), has_aux=True
    )

    def accumulate(
        grads: Any, micro: tuple[Array, Array, Array | None, Array]
    ) -> tuple[Any, Metrics]:
        latents_BTYXC, text_BSE, mask_BYX, index = micro
        positions_B = index * num_examples + first + jnp.arange(batch_size)
        draws = draw_examples(
            step_key,
            positions_B,
            sigma_grid=sigma_grid,
            shape_TYXC=latents_BTYXC.shape[1:],
            tasks=settings.tasks,
        )
        (_, loss_B), new_grads = grad_fn(
            trainable,
            *(frozen, latents_BTYXC, text_BSE, draws, mask_BYX),
            draw_dropout(step_key, positions_B, rate=settings.lora_dropout),
        )
        examples = {"loss_AB": loss_B, "sigma_AB": draws.sigma, "task_AB": draws.task}
        grads = jax.tree.map(lambda a, b: a + b / num_accumulate, grads, new_grads)
        return grads, examples

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
    micros = (*jax.tree.map(jnp.asarray, batch), jnp.arange(num_accumulate))
    if num_accumulate == 1:  # no copy of the gradient
        grads, of_micro = accumulate(zeros, jax.tree.map(lambda micro: micro[0], micros))
        examples = jax.tree.map(lambda leaf: leaf[None], of_micro)
    else:
        grads, examples = jax.lax.scan(accumulate, zeros, micros)
    if mesh is not None:
        grads = _average(grads, mesh)
    return grads, examples


def compile_train_step(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    settings: StepSettings,
    *,
    state: TrainState,
    frozen: Frozen,
) -> TrainStep:
    """Jits ``train_step`` (state, frozen, batch, key, sigma_grid); compiles once per batch shape.

    ``state`` and ``frozen`` may be described only: where their arrays lie says on which devices the
    step runs, and where it leaves the next state. The state is donated; explicit output shardings
    keep the second step from compiling again.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    mesh = places.step.mesh
    divided = None
    if mesh.size > 1:
        divided = Divided(mesh, specs_of(state.trainable), specs_of(frozen))
    step = partial(
        train_step, graphdef=graphdef, optimizer=optimizer, settings=settings, divided=divided
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(places, replicated(mesh)))


def _average(grads: Any, mesh: Mesh) -> Any:
    """The mean over devices; rows that lie on one of them have been summed up there."""
    if not isinstance(grads, dict):
        return jax.lax.pmean(grads, AXES)
    return {
        name: jax.lax.pmean(grad, (DATA, CONTEXT)) / mesh.shape[FSDP]
        if is_stacked(name) and is_split(name, grad.ndim)
        else jax.lax.pmean(grad, AXES)
        for name, grad in grads.items()
    }
