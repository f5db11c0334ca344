"""Where does a run report to? Its progress line, event file and W&B run, as the config says."""

import time
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wan22_jax.config import TrainConfig, dump_config
from wan22_jax.errors import BadInput
from wan22_jax.model.transformer import TransformerConfig
from wan22_jax.processes import is_main
from wan22_jax.resuming import Start, compare
from wan22_jax.training.events import Curve, Session, read_events
from wan22_jax.training.metrics import Plan, Progress
from wan22_jax.training.wandb_log import WandbLog


def open_progress(
    config: TrainConfig,
    run_dir: Path,
    start: Start,
    *,
    steps_per_epoch: int,
    model: TransformerConfig,
    schedule: optax.Schedule,
    total_steps: int,
) -> Progress:
    """Opens what a session reports through; what earlier sessions said of the epoch is read.

    Args:
        config: of the run.
        run_dir: its folder.
        start: where the session goes on.
        steps_per_epoch: of the loader.
        model: sizes, for the count of operations.
        schedule: learning rate by steps done.
        total_steps: steps after which the run ends.

    Raises:
        BadInput: Weights & Biases is asked for and cannot be had.
    """
    earlier, curves = read_events(run_dir)
    text = dump_config(config)
    session = Session(
        started_at=time.time(),
        first_step=start.step,
        first_epoch=(start.step + start.data_offset) // steps_per_epoch + 1,
        examples_per_step=config.global_batch if config.x_axis_examples else 0,
        changes=list_changes(earlier[-1].config, text) if earlier else (),
        config=text,
    )
    plan = Plan(
        total_steps=total_steps,
        epochs=config.epochs,
        logging_steps=config.logging_steps,
        steps_per_print=config.steps_per_print,
        model=model,
        lr_N=_list_rates(schedule, start, total_steps),
        trains_weights=config.adapter is None,
        skips_nonfinite=config.skip_nonfinite_steps,
    )
    losses_N = curves.get("train/loss", Curve(np.empty(0, int), np.empty(0)))
    is_kept_N = losses_N.steps_N <= start.step  # a kill may have come long after the checkpoint
    before_epoch = (session.first_epoch - 1) * steps_per_epoch - start.data_offset
    is_of_epoch_N = losses_N.steps_N > before_epoch
    return Progress(
        run_dir,
        session,
        plan,
        earlier_losses=losses_N.values_N[is_kept_N].tolist(),
        epoch_losses=losses_N.values_N[is_kept_N & is_of_epoch_N].tolist(),
        wandb=_open_wandb(config, run_dir),
    )


def _list_rates(schedule: optax.Schedule, start: Start, total_steps: int) -> np.ndarray:
    # All at once: a schedule computes on the device, where it would wait for the step under way.
    steps_N = jnp.arange(start.step, max(start.step, total_steps)) - start.schedule_start
    return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(steps_N))


def list_changes(before: str, now: str) -> tuple[str, ...]:
    """Compares two TOML texts key by key: "optimizer.lr 0.1 -> 0.2"."""
    return tuple(compare(tomllib.loads(before), tomllib.loads(now)))


def _open_wandb(config: TrainConfig, run_dir: Path) -> WandbLog | None:
    wanted = config.monitoring
    if not wanted.enable_wandb or not is_main():
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
