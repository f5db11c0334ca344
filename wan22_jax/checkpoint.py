"""Training state on disk: Orbax checkpoints of what trains, the optimizer and where the run is.

A run folder holds ``checkpoints/<step>/`` with the items ``trainable`` (path -> array),
``opt_state`` (path -> array) and ``meta`` (JSON). The frozen base is never in it; its digest is.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from wan22_jax.errors import BadInput, is_full_disk
from wan22_jax.training.step import TrainState

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
    needed = sum(array.nbytes for array in [*trainable.values(), *opt_state.values()])
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
    trainable = _rebuild(like.trainable, restored["trainable"])
    opt_state = _rebuild(like.opt_state, restored["opt_state"])
    count = jax.device_put(np.int32(step), like.step.sharding)
    return TrainState(count, trainable, opt_state), restored["meta"]


def read_meta(run_dir: Path) -> dict[str, Any]:
    """Reads the newest checkpoint's meta without its arrays."""
    with _manager(run_dir / FOLDER) as manager:
        step = manager.latest_step()
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def read_trainable(
    path: Path, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what trained (path -> host array) and the meta of one checkpoint.

    Args:
        path: a run folder, its ``checkpoints`` folder, or one step's folder.
        step: which checkpoint; the newest if left out.

    Raises:
        BadInput: there is no such checkpoint, or it was written by another version.
    """
    folder, step, meta = _find_checkpoint(path, step)
    with _manager(folder) as manager:
        saved = manager.restore(
            step, args=ocp.args.Composite(trainable=ocp.args.StandardRestore())
        )["trainable"]
    return {name: np.asarray(array) for name, array in saved.items()}, meta


def read_saved_meta(path: Path, step: int | None = None) -> dict[str, Any]:
    """Reads the meta of one checkpoint; arguments and errors as ``read_trainable``."""
    return _find_checkpoint(path, step)[2]


def _find_checkpoint(path: Path, step: int | None) -> tuple[Path, int, dict[str, Any]]:
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
    return folder, step, meta


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


def flatten_state(state: Any) -> dict[str, jax.Array]:
    """Maps an adapter, or any other tree, to path -> array."""
    if not isinstance(state, nnx.State):
        return _flatten_tree(state)
    return {_join(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _rebuild(like: Any, arrays: dict[str, jax.Array]) -> Any:
    if isinstance(like, nnx.State):
        return nnx.from_flat_state(
            [(path, leaf.replace(arrays[_join(path)])) for path, leaf in nnx.to_flat_state(like)]
        )
    return jax.tree.unflatten(
        jax.tree.structure(like), [arrays[name] for name in _flatten_tree(like)]
    )


def _manager(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(create=False),
        item_names=("trainable", "opt_state", "meta"),
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
