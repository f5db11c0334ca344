"""From where does a run go on, with what of its state, and what has changed since?"""

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wan22_jax.checkpoint import (
    FOLDER,
    Checkpoints,
    find_damage,
    list_steps,
    read_meta,
    restore_state,
)
from wan22_jax.errors import BadInput
from wan22_jax.training.step import TrainState

_DAMAGED = ".damaged"
_COMPARED = ("config", "parallel", "dataset", "global_batch", "steps_per_epoch")
log = logging.getLogger(__name__)


class Reset(NamedTuple):
    """What starts anew where a run goes on; all else is as it was.

    ``optimizer``: its state and the schedule of the learning rate. ``optimizer_params``: the
    schedule alone. ``dataloader``: the epoch, from its first batch. The weights and the number of
    the step never do.
    """

    optimizer: bool = False
    optimizer_params: bool = False
    dataloader: bool = False


NOTHING = Reset()


class Start(NamedTuple):
    """Where a run starts; every checkpoint says so too, so that the run can stop and go on."""

    step: int = 0  # steps done
    data_offset: int = 0  # step k trains on batch k + data_offset of the loader
    schedule_start: int = 0  # the step at which the learning rate's schedule began


def choose_checkpoint(run_dir: Path) -> dict[str, Any]:
    """Returns the meta of the newest sound checkpoint; sets newer, damaged ones aside.

    Raises:
        BadInput: none is sound.
    """
    folder = run_dir / FOLDER
    damages: dict[int, str] = {}
    for step in sorted(list_steps(folder), reverse=True):
        damage = find_damage(folder / str(step))
        if damage is None:
            for other, what in damages.items():
                _set_aside(folder / str(other), what, instead=folder / str(step))
            return read_meta(folder / str(step))
        damages[step] = damage
    raise BadInput(
        f"{folder}: no checkpoint is sound ({'; '.join(damages.values())}); bring one back from a "
        "backup or start a new run"
    )


def choose_start(
    saved: dict[str, Any], *, steps_per_epoch: int, global_batch: int, reset: Reset
) -> Start:
    """Finds the place in the data and in the schedule.

    Args:
        saved: meta of the checkpoint.
        steps_per_epoch: as it is now. If it was another one, the run goes on in the same epoch: at
            the same share of it if steps take more or fewer clips than before, as another number of
            GPUs makes them, else after as many steps, as other data do.
        global_batch: clips of a step now.
        reset: what starts anew.
    """
    step, before = saved["step"], saved["steps_per_epoch"]
    epoch, position = divmod(step + saved["data_offset"], before)
    if saved.get("global_batch", global_batch) != global_batch:
        position = position * steps_per_epoch // before
    position = 0 if reset.dataloader else min(position, steps_per_epoch)
    return Start(
        step,
        data_offset=epoch * steps_per_epoch + position - step,
        schedule_start=step
        if reset.optimizer or reset.optimizer_params
        else saved["schedule_start"],
    )


def resume_state(
    checkpoints: Checkpoints, fresh: TrainState, *, step: int, reset: Reset
) -> TrainState:
    """Restores a checkpoint, but for what is reset.

    Args:
        checkpoints: of the run.
        fresh: the state before the first step of a new run.
        step: which checkpoint.
        reset: what starts anew.

    Raises:
        BadInput: what was saved does not fit the config.
    """
    state, _ = restore_state(checkpoints, fresh, step=step, with_optimizer=not reset.optimizer)
    if reset.optimizer_params and not reset.optimizer:
        return state._replace(opt_state=restart_schedules(state.opt_state))
    return state


def restart_schedules(opt_state: optax.OptState) -> optax.OptState:
    """Sets the counts of schedules to 0; those of moments, which correct their bias, stay."""

    def is_schedule(node: Any) -> bool:
        return getattr(node, "_fields", None) == ("count",)

    def restart(node: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, node) if is_schedule(node) else node

    return jax.tree.map(restart, opt_state, is_leaf=is_schedule)


def list_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists the keys of the configs, and the length of an epoch, that differ: old -> new."""
    return compare(*({name: meta.get(name) for name in _COMPARED} for meta in (saved, now)))


def compare(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists the leaves of two trees that differ: old -> new."""
    before, after = _flatten(saved), _flatten(now)
    return [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]


def _set_aside(checkpoint: Path, damage: str, *, instead: Path) -> None:
    aside = checkpoint.with_name(checkpoint.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    log.warning(
        "warning: %s is damaged (%s); it is called %s now, and the run goes on from %s",
        *(checkpoint, damage, aside.name, instead),
    )


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(f"{name}.{key}".lstrip("."), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for name, item in items for key, leaf in _flatten(item, name).items()}
