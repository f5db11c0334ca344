"""How does a gradient become an update: schedule, clipping, the optimizer of the config.

Which optimizers there are is said in ``optimizer_options.py``. Here parameters are any tree; the
optimizers see them, and keep their state, as a dict from path to array.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wan22_jax.config import TrainConfig
from wan22_jax.training.optimizer_options import Options, by_path, find_optimizer

Tree = Any  # of arrays


def make_schedule(config: TrainConfig, *, total_steps: int) -> optax.Schedule:
    """Makes the learning rate as a function of the steps done: warm-up, then ``lr_scheduler``.

    The first of W steps of warm-up takes lr / W, as in diffusion-pipe. Unlike there the main
    schedule spans what is left, so that 'linear' ends at 0 and 'cosine' at ``lr_min`` after the
    last step. ``force_constant_lr`` takes the place of all of it.

    Args:
        config: of the run.
        total_steps: that the whole run has.
    """
    if config.force_constant_lr is not None:
        return optax.constant_schedule(config.force_constant_lr)
    lr, warmup_steps = config.learning_rate, config.warmup_steps
    span = max(1, total_steps - warmup_steps)
    if config.lr_scheduler == "linear":
        main = optax.linear_schedule(lr, 0.0, span)
    elif config.lr_scheduler == "cosine":
        main = optax.cosine_decay_schedule(lr, span, min(1.0, config.lr_min / lr))
    else:
        main = optax.constant_schedule(lr)
    if warmup_steps == 0:
        return main
    return optax.join_schedules(
        [optax.linear_schedule(lr / warmup_steps, lr, warmup_steps), main], [warmup_steps]
    )


def make_optimizer(
    options: Options,
    *,
    schedule: optax.Schedule,
    gradient_clipping: float,
    global_batch: int = 1,
    lr_ratios: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """Clips the global norm, then does what ``[optimizer]`` says.

    Args:
        options: the ``[optimizer]`` table.
        schedule: from ``make_schedule``.
        gradient_clipping: largest norm of all gradients together, 0 for any.
        global_batch: clips of one step; only ``beta2_half_life`` asks for it.
        lr_ratios: for parameters whose path begins so, what their learning rate is in proportion
            to that of the others.
    """
    steps = []
    if gradient_clipping > 0:
        steps.append(optax.clip_by_global_norm(gradient_clipping))
    steps.append(options.make(schedule, global_batch=global_batch))
    if lr_ratios:
        steps.append(_scale_by_path(lr_ratios))
    return _by_path(steps[0] if len(steps) == 1 else optax.chain(*steps))


def describe_optimizer(config: TrainConfig) -> str:
    """Says in a line what the config's optimizer is, and what its name means where that is not."""
    options = config.optimizer
    known = find_optimizer(options.type)
    remark = f" ({known.remark})" if known.remark else ""
    shape = config.lr_scheduler
    if config.force_constant_lr is not None:
        return f"{options.type}{remark}, constant lr {config.force_constant_lr:g}"
    return f"{options.type}{remark}, lr {config.learning_rate:g}, {shape} after warm-up"


def _by_path(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transformation on dicts from path to array, whatever the tree is."""

    def init(params: Tree) -> optax.OptState:
        return inner.init(by_path(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Tree, optax.OptState]:
        grads = by_path(updates)
        changes: Any
        changes, state = inner.update(grads, state, by_path(params))
        return jax.tree.unflatten(
            jax.tree.structure(updates), [changes[name] for name in grads]
        ), state

    return optax.GradientTransformation(init, update)


def _scale_by_path(ratios: Mapping[str, float]) -> optax.GradientTransformation:
    def ratio_of(name: str) -> float:
        found = [ratio for start, ratio in ratios.items() if name.startswith(f"{start}.")]
        return found[0] if found else 1.0

    def scale(updates: Any, _: Any) -> dict[str, jax.Array]:
        return {
            name: jnp.asarray(ratio_of(name), update.dtype) * update
            for name, update in updates.items()
        }

    return optax.stateless(scale)
