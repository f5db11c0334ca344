"""Training state on disk: Orbax checkpoints of what trains, the optimizer and where the run is.

A run folder holds ``checkpoints/<step>/`` with the items ``trainable``, ``opt_state`` and, where
there is one, ``ema`` (each path -> array), and ``meta.json``: what is known of the run, and size
and checksum of every file. The frozen base is never in it; its digest is.

A checkpoint is written beside its name and renamed when all of it is on disk; it is renamed before
it is removed. So a folder named after a step is complete, unless the disk has lost some of it, and
that the checksums tell.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from wan22_jax import processes
from wan22_jax.errors import BadInput, is_full_disk
from wan22_jax.joint_save import JointSave
from wan22_jax.training.averages import average_of_arrays
from wan22_jax.training.ema import start_ema
from wan22_jax.training.optimizer_options import ScheduleFreeAdamW, by_path, find_optimizer
from wan22_jax.training.step import TrainState

VERSION = 2
FOLDER = "checkpoints"
_META = "meta.json"
_UNFINISHED, _REMOVED = ".unfinished", ".removed"
_SPARE_BYTES = 2**20  # for metadata, and for the logs until the next checkpoint
FULL_DISK_REMEDY = (
    "free some space, then go on from the last complete checkpoint with --resume_from_checkpoint"
)
log = logging.getLogger(__name__)


class FullDisk(BadInput):
    """There is no room for a checkpoint; those before it are as they were."""


class Checkpoints:
    """The checkpoints of one run, saved in the background one at a time.

    Attributes:
        directory: where they lie.
        last: the newest complete one that this object knows of, None without any.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.last = max(list_steps(directory), default=None)
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._under_way: tuple[int, Future[None]] | None = None

    def save(
        self, state: TrainState, meta: dict[str, Any], *, prune: Callable[[], None] | None = None
    ) -> None:
        """Starts saving, when what is being saved is on disk.

        Args:
            state: copied before this returns.
            meta: goes with it, and version, step and what arrays there are.
            prune: called in the background once the checkpoint is complete.

        Raises:
            FullDisk: there is no room, or there was none for the save before this one.
        """
        self.wait()
        step, items = int(state.step), _name_arrays(state)
        needed = sum(array.nbytes for arrays in items.values() for array in arrays.values())
        free = processes.from_main(lambda: shutil.disk_usage(self.directory).free, "free")
        if free < needed + _SPARE_BYTES:
            raise FullDisk(
                f"{self.directory / str(step)}: a checkpoint takes {needed / 1e6:,.1f} MB, the "
                f"disk has {free / 1e6:,.1f} MB free"
            )
        arrays = {name: _describe_arrays(item) for name, item in items.items()}
        meta = {"version": VERSION, "step": step, **meta, "arrays": arrays}
        unfinished = self.directory / f"{step}{_UNFINISHED}"

        def publish() -> None:
            self._publish(unfinished, step, meta, prune)

        if processes.count() > 1:
            joint = JointSave(unfinished, items)
            self._under_way = step, self._worker.submit(joint.complete, publish)
            return
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._explain_full_disk():
            self._checkpointer.save(unfinished, args=ocp.args.Composite(**saved))
        self._under_way = step, self._worker.submit(_complete, self._checkpointer, publish)

    def check(self) -> None:
        """Raises FullDisk if a save has failed since the last call; does not wait for one."""
        if self._under_way is not None and self._under_way[1].done():
            self.wait()

    def describe_last(self) -> str:
        """Says which checkpoint the run can go on from; waits for one that is under way."""
        with contextlib.suppress(FullDisk):
            self.wait()
        if self.last is None:
            return "there is no checkpoint to go on from"
        return f"the last good checkpoint is {self.directory / str(self.last)}"

    def wait(self) -> None:
        """Waits for the save under way; raises FullDisk if it failed."""
        if self._under_way is not None:
            (step, under_way), self._under_way = self._under_way, None
            with self._explain_full_disk():
                under_way.result()
                self.last = step

    def close(self) -> None:
        """Waits for the save under way, whatever becomes of it."""
        self._worker.shutdown()
        self._drop_checkpointer()

    def _publish(
        self, unfinished: Path, step: int, meta: dict[str, Any], prune: Callable[[], None] | None
    ) -> None:
        files = {
            str(path.relative_to(unfinished)): [path.stat().st_size, _checksum(path)]
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        (unfinished / _META).write_text(json.dumps(meta | {"files": files}), "utf-8")
        complete = self.directory / str(step)
        if complete.exists():
            _remove(complete)
        unfinished.rename(complete)
        if prune is not None:
            prune()

    @contextmanager
    def _explain_full_disk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises ValueError only
            self._drop_checkpointer()  # its threads may have died
            _remove_unfinished(self.directory)
            if not is_full_disk(error):
                raise
            raise FullDisk(f"{self.directory}: the disk filled up") from error

    def _drop_checkpointer(self) -> None:
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            try:
                checkpointer.close()
            except (OSError, ValueError) as error:  # of the save that failed, told again
                log.debug("%s", error)


def _complete(checkpointer: ocp.AsyncCheckpointer, publish: Callable[[], None]) -> None:
    checkpointer.wait_until_finished()
    publish()


@contextmanager
def open_checkpoints(run_dir: Path) -> Iterator[Checkpoints]:
    """Opens the run's checkpoints for saving; what is under way at the end is waited for.

    What a killed run left half-written goes first, and so does what is half-written at the end.

    Raises:
        FullDisk: the last save failed.
        BadInput: another process has them open, or the disk filled up inside of this context.
    """
    folder = (run_dir / FOLDER).absolute()
    lock = processes.from_main(lambda: _lock(folder, run_dir), "lock")
    _remove_unfinished(folder)
    checkpoints = Checkpoints(folder)
    try:
        yield checkpoints
        checkpoints.wait()
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise BadInput(f"{folder}: the disk filled up; {FULL_DISK_REMEDY}") from error
    finally:
        checkpoints.close()
        _remove_unfinished(folder)
        if processes.is_main():
            os.close(lock)


def _lock(folder: Path, run_dir: Path) -> int:
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # the kernel lets go of it when the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BadInput(
            f"{run_dir}: another process is training this run; wait for it, or end it first"
        ) from None
    except OSError as error:  # some network disks have no locks
        log.debug("%s: cannot be locked (%s)", folder, error)
    return lock


def restore_state(
    checkpoints: Checkpoints,
    like: TrainState,
    *,
    step: int | None = None,
    with_optimizer: bool = True,
) -> tuple[TrainState, dict[str, Any]]:
    """Restores a checkpoint into the shapes, dtypes and shardings of ``like``.

    Args:
        checkpoints: of the run.
        like: the state before the first step.
        step: which one; the newest if left out.
        with_optimizer: False keeps the optimizer state of ``like``.

    Raises:
        BadInput: there is none, or what it holds does not fit.
    """
    step = max(list_steps(checkpoints.directory), default=None) if step is None else step
    if step is None:
        raise BadInput(f"{checkpoints.directory}: holds no checkpoint to resume from")
    folder = checkpoints.directory / str(step)
    meta = read_meta(folder)
    wanted = _name_arrays(like)
    if not with_optimizer:
        del wanted["opt_state"]
    if "ema" not in meta["arrays"] and wanted.pop("ema", None) is not None:
        log.warning("%s: has no average of the weights (EMA); it starts from them", folder)
    for name, arrays in wanted.items():
        _check_fit(folder, name, meta["arrays"][name], _describe_arrays(arrays))
    arguments = {
        name: ocp.args.StandardRestore(
            {
                path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
                for path, array in arrays.items()
            }
        )
        for name, arrays in wanted.items()
    }
    restored = _read(folder, arguments)
    fields = {name: _rebuild(getattr(like, name), arrays) for name, arrays in restored.items()}
    if like.ema is not None and "ema" not in fields:
        fields["ema"] = start_ema(fields["trainable"])
    count = jax.device_put(np.int32(step), like.step.sharding)
    return like._replace(step=count, **fields), meta


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Reads what a checkpoint's folder says of its run, without its arrays.

    Raises:
        BadInput: it was written by another version, or is damaged.
    """
    try:
        meta = json.loads((checkpoint / _META).read_text("utf-8"))
        version = meta["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{checkpoint}: is damaged ({_META}: {error})") from None
    if version != VERSION:
        raise BadInput(f"{checkpoint}: checkpoint version {version}, expected {VERSION}")
    return meta


def find_damage(checkpoint: Path, *, items: tuple[str, ...] = ()) -> str | None:
    """Compares a checkpoint's files with their sizes and checksums; says what is wrong, or None.

    Args:
        checkpoint: the folder of one step.
        items: look at these alone.
    """
    try:
        files = read_meta(checkpoint)["files"]
    except BadInput as error:
        return str(error)
    for name, (size, checksum) in files.items():
        path = checkpoint / name
        if items and name.partition("/")[0] not in items:
            continue
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, {size} were written"
        if _checksum(path) != checksum:
            return f"{path} has other bytes than were written"
    return None


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
        BadInput: there is no such checkpoint, it holds no average, it was written by another
            version, or is damaged.
    """
    checkpoint, items, meta = find_trainable(path, step, ema=ema)
    arrays = {item: read_arrays(checkpoint, item, meta["arrays"][item]) for item in items}
    if "opt_state" in arrays:
        return average_of_arrays(arrays["trainable"], arrays["opt_state"]), meta
    return arrays[items[0]], meta


def find_trainable(
    path: Path, step: int | None = None, *, ema: bool = False
) -> tuple[Path, tuple[str, ...], dict[str, Any]]:
    """Finds what ``read_trainable`` reads, and checks it; arguments and errors are the same.

    Returns:
        The folder of the checkpoint, its items that are needed, and its meta. Of a schedule-free
        optimizer two items make the weights, else one holds them.
    """
    checkpoint, meta = _find_checkpoint(path, step)
    if ema and "ema" not in meta["arrays"]:
        raise BadInput(f"{checkpoint}: holds no average, ema_decay was not set; leave --ema out")
    items = ("ema",) if ema else ("trainable",)
    if not ema and _is_schedule_free(meta):
        items = ("trainable", "opt_state")
    damage = find_damage(checkpoint, items=items)
    if damage is not None:
        steps = sorted(list_steps(checkpoint.parent))
        raise BadInput(f"{damage}; choose another checkpoint with --step, there are {steps}")
    return checkpoint, items, meta


def read_arrays(checkpoint: Path, item: str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads arrays of an item, without the others, from however many devices they came."""
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        target = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return checkpointer.restore(
            (checkpoint / item).absolute(),
            ocp.args.PyTreeRestore(
                dict.fromkeys(target, 0), restore_args=target, partial_restore=True
            ),
        )


def read_saved_meta(path: Path, step: int | None = None) -> dict[str, Any]:
    """Reads the meta of one checkpoint; arguments and errors as ``read_trainable``."""
    return _find_checkpoint(path, step)[1]


def _find_checkpoint(path: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    if path.name.isdigit() and path.parent.name == FOLDER:
        path, step = path.parent, int(path.name) if step is None else step
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = sorted(list_steps(folder))
    if not steps:
        raise BadInput(f"{path}: holds no checkpoint; give a run folder made by wan22-train")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise BadInput(f"{folder}: has no checkpoint of step {step}; it has {steps}")
    return folder / str(step), read_meta(folder / str(step))


def find_run(output_dir: Path, name: str | None) -> Path:
    """Returns the run folder to resume: the named one (or path), else the newest with checkpoints.

    Raises:
        BadInput: there is none.
    """
    if name is not None:
        for run_dir in (output_dir / name, Path(name)):
            if list_steps(run_dir / FOLDER):
                return run_dir
        raise BadInput(
            f"{output_dir / name}: is not a run folder with checkpoints; leave the name out to "
            "resume the newest run, or start one without the flag"
        )
    runs = sorted(path.parent for path in output_dir.glob(f"*/{FOLDER}") if list_steps(path))
    if not runs:
        raise BadInput(f"{output_dir}: holds no run to resume from; start one without the flag")
    return runs[-1]


def list_steps(folder: Path) -> list[int]:
    """Lists the steps of the complete checkpoints in a ``checkpoints`` folder."""
    if not folder.is_dir():
        return []
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()]


def remove_checkpoint(folder: Path, step: int) -> None:
    """Removes a checkpoint; a kill in between leaves nothing that looks like one."""
    _remove(folder / str(step))


def flatten_state(state: Any) -> dict[str, jax.Array]:
    """Maps an adapter, or any other tree, to path -> array."""
    if not isinstance(state, nnx.State):
        return by_path(state)
    return {_join(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _is_schedule_free(meta: dict[str, Any]) -> bool:
    options = meta["config"].get("optimizer", {})
    return find_optimizer(options.get("type", "adamw")).options is ScheduleFreeAdamW


def _name_arrays(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """The items of a state but for its step: path -> array of each that there is."""
    return {
        name: flatten_state(value)
        for name, value in state._asdict().items()
        if name != "step" and value is not None
    }


def _rebuild(like: Any, arrays: dict[str, jax.Array]) -> Any:
    if isinstance(like, nnx.State):
        return nnx.from_flat_state(
            [(path, leaf.replace(arrays[_join(path)])) for path, leaf in nnx.to_flat_state(like)]
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in by_path(like)])


def _check_fit(folder: Path, item: str, saved: dict[str, str], wanted: dict[str, str]) -> None:
    differing = [name for name in sorted(saved | wanted) if saved.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        remedy = (
            "resume with the original [optimizer] or add --reset_optimizer"
            if item == "opt_state"
            else "resume with the original config or start a new run"
        )
        raise BadInput(
            f"{folder / item}: does not fit the config, {len(differing)} arrays differ ({name}: "
            f"saved {saved.get(name, 'not at all')}, expected {wanted.get(name, 'none')}); {remedy}"
        )


def _read(folder: Path, arguments: dict[str, ocp.args.StandardRestore]) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(folder.absolute(), ocp.args.Composite(**arguments))
        return {name: restored[name] for name in arguments}


def _describe_arrays(arrays: dict[str, jax.Array]) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _remove(folder: Path) -> None:
    removed = folder.with_name(f"{folder.name}{_REMOVED}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _remove_unfinished(folder: Path) -> None:
    if not processes.is_main():
        return
    for pattern in (f"*{_UNFINISHED}*", f"*{_REMOVED}", "*.orbax-checkpoint-tmp"):
        for unfinished in folder.glob(pattern):
            shutil.rmtree(unfinished, ignore_errors=True)  # an interrupted save may still run


def _join(path: tuple) -> str:
    return ".".join(map(str, path))
