"""Where does a run report to? Its progress line, event file and W&B run, as the config says."""

import time
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wan22_jax.config import TrainConfig, dump_config
from wan22_jax.errors import BadInput
from wan22_jax.model.transformer import TransformerConfig
from wan22_jax.training.events import Curve, Session, read_events
from wan22_jax.training.metrics import Plan, Progress
from wan22_jax.training.wandb_log import WandbLog


def open_progress(
    config: TrainConfig,
    run_dir: Path,
    *,
    steps_per_epoch: int,
    model: TransformerConfig,
    schedule: optax.Schedule,
    first_step: int,
    total_steps: int,
) -> Progress:
    """Opens what a session reports through; what earlier sessions said of the epoch is read.

    Args:
        config: of the run.
        run_dir: its folder.
        steps_per_epoch: of the loader.
        model: sizes, for the count of operations.
        schedule: learning rate by steps done.
        first_step: steps that are done.
        total_steps: steps after which the run ends.

    Raises:
        BadInput: Weights & Biases is asked for and cannot be had.
    """
    earlier, curves = read_events(run_dir)
    text = dump_config(config)
    per_step = config.micro_batch * config.gradient_accumulation_steps
    session = Session(
        started_at=time.time(),
        first_step=first_step,
        first_epoch=first_step // steps_per_epoch + 1,
        examples_per_step=per_step if config.x_axis_examples else 0,
        changes=list_changes(earlier[-1].config, text) if earlier else (),
        config=text,
    )
    plan = Plan(
        total_steps=total_steps,
        epochs=config.epochs,
        logging_steps=config.logging_steps,
        steps_per_print=config.steps_per_print,
        model=model,
        lr_N=_list_rates(schedule, first_step, total_steps),
        trains_weights=config.adapter is None,
    )
    losses_N = curves.get("train/loss", Curve(np.empty(0, int), np.empty(0)))
    is_kept_N = losses_N.steps_N <= first_step  # a kill may have come long after the checkpoint
    is_of_epoch_N = losses_N.steps_N > (session.first_epoch - 1) * steps_per_epoch
    return Progress(
        run_dir,
        session,
        plan,
        earlier_losses=losses_N.values_N[is_kept_N].tolist(),
        epoch_losses=losses_N.values_N[is_kept_N & is_of_epoch_N].tolist(),
        wandb=_open_wandb(config, run_dir),
    )


def _list_rates(schedule: optax.Schedule, first_step: int, total_steps: int) -> np.ndarray:
    # All at once: a schedule computes on the device, where it would wait for the step under way.
    steps_N = jnp.arange(first_step, max(first_step, total_steps))
    return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(steps_N))


def list_changes(before: str, now: str) -> tuple[str, ...]:
    """Compares two TOML texts key by key: "optimizer.lr 0.1 -> 0.2"."""
    old, new = (_flatten(tomllib.loads(text)) for text in (before, now))
    return tuple(
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _open_wandb(config: TrainConfig, run_dir: Path) -> WandbLog | None:
    wanted = config.monitoring
    if not wanted.enable_wandb:
        return None
    if wanted.wandb_tracker_name is None:
        raise BadInput(
            "[monitoring] enable_wandb = true needs wandb_tracker_name, the project's name there"
        )
    return WandbLog(
        run_dir,
        api_key=wanted.wandb_api_key,
        project=wanted.wandb_tracker_name,
        name=wanted.wandb_run_name or run_dir.name,
        config=config.model_dump(exclude_none=True),  # which holds no key
    )
