"""Training state on disk: Orbax checkpoints of the adapter, the optimizer and where the run is.

A run folder holds ``checkpoints/<step>/`` with the items ``trainable`` (path -> array),
``opt_state`` (path -> array), ``ema`` (path -> array, where weights are averaged) and ``meta``
(JSON). The frozen base is never in it; its digest is.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from wan22_jax.errors import BadInput, is_full_disk
from wan22_jax.training.averages import average_of_arrays
from wan22_jax.training.optimizer_options import ScheduleFreeAdamW, find_optimizer
from wan22_jax.training.step import TrainState, start_ema

VERSION = 1
FOLDER = "checkpoints"
_SPARE_BYTES = 2**20  # for metadata, and for the logs until the next checkpoint
_FULL_DISK_REMEDY = (
    "free some space, then go on from the last complete checkpoint with --resume_from_checkpoint"
)


@contextmanager
def open_checkpoints(run_dir: Path) -> Iterator[ocp.CheckpointManager]:
    """Opens the run's checkpoints for saving and restoring; saves are asynchronous and atomic.

    What a killed run left half-written goes first, and so does what is half-written at the end.

    Raises:
        BadInput: the disk filled up inside of this context.
    """
    folder = (run_dir / FOLDER).absolute()
    folder.mkdir(exist_ok=True)
    _remove_unfinished(folder)
    try:
        with _manager(folder) as manager:
            yield manager
            manager.wait_until_finished()
    except (OSError, ValueError) as error:  # TensorStore raises ValueError only
        if not is_full_disk(error):
            raise
        raise BadInput(f"{folder}: the disk filled up; {_FULL_DISK_REMEDY}") from error
    finally:
        _remove_unfinished(folder)


def save_state(manager: ocp.CheckpointManager, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts saving; ``meta`` gets the version and the step; BadInput if the disk is too small."""
    step = int(state.step)
    trainable, opt_state = flatten_state(state.trainable), _flatten_tree(state.opt_state)
    manager.wait_until_finished()  # what is still being written takes space too
    ema = {} if state.ema is None else flatten_state(state.ema)
    needed = sum(a.nbytes for arrays in (trainable, opt_state, ema) for a in arrays.values())
    free = shutil.disk_usage(manager.directory).free
    if free < needed + _SPARE_BYTES:
        raise BadInput(
            f"{manager.directory / str(step)}: a checkpoint takes {needed / 1e6:,.1f} MB, the disk "
            f"has {free / 1e6:,.1f} MB free; {_FULL_DISK_REMEDY}"
        )
    manager.save(
        step,
        args=ocp.args.Composite(
            trainable=ocp.args.StandardSave(trainable),
            opt_state=ocp.args.StandardSave(opt_state),
            **({} if state.ema is None else {"ema": ocp.args.StandardSave(ema)}),
            meta=ocp.args.JsonSave({"version": VERSION, "step": step, **meta}),
        ),
    )


def restore_state(
    manager: ocp.CheckpointManager, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Restores the newest checkpoint into the shapes, dtypes and shardings of ``like``."""
    step = manager.latest_step()
    if step is None:
        raise BadInput(f"{manager.directory}: holds no checkpoint to resume from")
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            trainable=ocp.args.StandardRestore(_abstract(flatten_state(like.trainable))),
            opt_state=ocp.args.StandardRestore(_abstract(_flatten_tree(like.opt_state))),
            meta=ocp.args.JsonRestore(),
        ),
    )
    trainable = nnx.from_flat_state(
        [
            (path, leaf.replace(restored["trainable"][_join(path)]))
            for path, leaf in nnx.to_flat_state(like.trainable)
        ]
    )
    opt_state = jax.tree.unflatten(
        jax.tree.structure(like.opt_state),
        [restored["opt_state"][name] for name in _flatten_tree(like.opt_state)],
    )
    count = jax.device_put(np.int32(step), like.step.sharding)
    state = TrainState(count, trainable, opt_state)
    if like.ema is not None:
        state = state._replace(ema=_restore_ema(manager, step, like.ema, trainable))
    return state, restored["meta"]


def _restore_ema(
    manager: ocp.CheckpointManager, step: int, like: nnx.State, trainable: nnx.State
) -> nnx.State:
    if not (Path(manager.directory) / str(step) / "ema").is_dir():
        return start_ema(trainable)  # the run has not averaged so far
    args = ocp.args.Composite(ema=ocp.args.StandardRestore(_abstract(flatten_state(like))))
    arrays = manager.restore(step, args=args)["ema"]
    return nnx.from_flat_state(
        [(path, leaf.replace(arrays[_join(path)])) for path, leaf in nnx.to_flat_state(like)]
    )


def read_meta(run_dir: Path) -> dict[str, Any]:
    """Reads the newest checkpoint's meta without its arrays."""
    with _manager(run_dir / FOLDER) as manager:
        step = manager.latest_step()
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def read_trainable(
    path: Path, step: int | None = None, *, ema: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what was trained (path -> host array) and the meta of one checkpoint.

    Of a schedule-free optimizer that is the average that it has learnt.

    Args:
        path: a run folder, its ``checkpoints`` folder, or one step's folder.
        step: which checkpoint; the newest if left out.
        ema: the average over the steps instead of the weights themselves.

    Raises:
        BadInput: there is no such checkpoint, it holds no average, or it was written by another
            version.
    """
    if path.name.isdigit() and path.parent.name == FOLDER:
        path, step = path.parent, int(path.name) if step is None else step
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if not _holds_checkpoint(folder):
        raise BadInput(f"{path}: holds no checkpoint; give a run folder made by wan22-train")
    with _manager(folder) as manager:
        steps = sorted(manager.all_steps())
        step = steps[-1] if step is None else step
        if step not in steps:
            raise BadInput(f"{folder}: has no checkpoint of step {step}; it has {steps}")
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["version"] != VERSION:
            raise BadInput(f"{folder}: checkpoint version {meta['version']}, expected {VERSION}")
        if ema and not (folder / str(step) / "ema").is_dir():
            raise BadInput(
                f"{folder / str(step)}: holds no average, ema_decay was not set; leave --ema out"
            )
        read = partial(_read_item, manager, step)
        saved = read("ema" if ema else "trainable")
        if not ema and _is_schedule_free(meta):
            saved = average_of_arrays(saved, read("opt_state"))
    return saved, meta


def find_run(output_dir: Path, name: str | None) -> Path:
    """Returns the run folder to resume: the named one (or path), else the newest with checkpoints.

    Raises:
        BadInput: there is none.
    """
    if name is not None:
        for run_dir in (output_dir / name, Path(name)):
            if _holds_checkpoint(run_dir / FOLDER):
                return run_dir
        raise BadInput(
            f"{output_dir / name}: is not a run folder with checkpoints; leave the name out to "
            "resume the newest run, or start one without the flag"
        )
    runs = sorted(path.parent for path in output_dir.glob(f"*/{FOLDER}") if _holds_checkpoint(path))
    if not runs:
        raise BadInput(f"{output_dir}: holds no run to resume from; start one without the flag")
    return runs[-1]


def flatten_state(state: nnx.State) -> dict[str, jax.Array]:
    """Maps a state to path -> array."""
    return {_join(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _read_item(manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, np.ndarray]:
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore()})
    return {name: np.asarray(a) for name, a in manager.restore(step, args=args)[item].items()}


def _is_schedule_free(meta: dict[str, Any]) -> bool:
    options = meta.get("config", {}).get("optimizer", {})
    return find_optimizer(options.get("type", "adamw")).options is ScheduleFreeAdamW


def _manager(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(create=False),
        item_names=("trainable", "opt_state", "ema", "meta"),
    )


def _holds_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def _remove_unfinished(folder: Path) -> None:
    # Orbax's own cleaning runs in the background, and prints a traceback where the program ends.
    for unfinished in folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)  # a save that was interrupted may still run


def _join(path: tuple) -> str:
    return ".".join(map(str, path))


def _flatten_tree(tree: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _abstract(arrays: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        for name, array in arrays.items()
    }
