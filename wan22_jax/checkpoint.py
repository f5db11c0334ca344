"""Training state on disk: Orbax checkpoints of the adapter, the optimizer and where the run is.

A run folder holds ``checkpoints/<step>/`` with the items ``trainable`` (path -> array),
``opt_state`` (path -> array) and ``meta`` (JSON). The frozen base is never in it; its digest is.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from wan22_jax.errors import BadInput
from wan22_jax.training.step import TrainState

VERSION = 1
FOLDER = "checkpoints"


def open_checkpoints(run_dir: Path) -> ocp.CheckpointManager:
    """Opens the run's checkpoints for saving and restoring; saves are asynchronous and atomic."""
    return ocp.CheckpointManager(
        (run_dir / FOLDER).absolute(),
        options=ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True),
        item_names=("trainable", "opt_state", "meta"),
    )


def save_state(manager: ocp.CheckpointManager, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts saving; ``meta`` gets the version and the step."""
    step = int(state.step)
    manager.save(
        step,
        args=ocp.args.Composite(
            trainable=ocp.args.StandardSave(flatten_state(state.trainable)),
            opt_state=ocp.args.StandardSave(_flatten_tree(state.opt_state)),
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
    return TrainState(count, trainable, opt_state), restored["meta"]


def read_meta(manager: ocp.CheckpointManager) -> dict[str, Any]:
    """Reads the newest checkpoint's meta without its arrays."""
    step = manager.latest_step()
    if step is None:
        raise BadInput(f"{manager.directory}: holds no checkpoint to resume from")
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def read_trainable(
    path: Path, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the adapter (path -> host array) and the meta of one checkpoint.

    Args:
        path: a run folder, its ``checkpoints`` folder, or one step's folder.
        step: which checkpoint; the newest if left out.

    Raises:
        BadInput: there is no such checkpoint, or it was written by another version.
    """
    if path.name.isdigit() and path.parent.name == FOLDER:
        path, step = path.parent, int(path.name) if step is None else step
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if not folder.is_dir() or not any(entry.name.isdigit() for entry in folder.iterdir()):
        raise BadInput(f"{path}: holds no checkpoint; give a run folder made by wan22-train")
    with ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(create=False),
        item_names=("trainable", "opt_state", "meta"),
    ) as manager:
        steps = sorted(manager.all_steps())
        step = steps[-1] if step is None else step
        if step not in steps:
            raise BadInput(f"{folder}: has no checkpoint of step {step}; it has {steps}")
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["version"] != VERSION:
            raise BadInput(f"{folder}: checkpoint version {meta['version']}, expected {VERSION}")
        saved = manager.restore(
            step, args=ocp.args.Composite(trainable=ocp.args.StandardRestore())
        )["trainable"]
    return {name: np.asarray(array) for name, array in saved.items()}, meta


def find_run(output_dir: Path, name: str | None) -> Path:
    """Returns the run folder to resume: the named one (or path), else the newest with checkpoints.

    Raises:
        BadInput: there is none.
    """
    if name is not None:
        for run_dir in (output_dir / name, Path(name)):
            if (run_dir / FOLDER).is_dir():
                return run_dir
        raise BadInput(f"{output_dir / name}: is not a run folder with checkpoints")
    runs = sorted(path.parent for path in output_dir.glob(f"*/{FOLDER}"))
    if not runs:
        raise BadInput(f"{output_dir}: holds no run to resume from; start one without the flag")
    return runs[-1]


def flatten_state(state: nnx.State) -> dict[str, jax.Array]:
    """Maps a state to path -> array."""
    return {_join(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


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
