"""What does a run write of itself while it goes, and what if the disk is full?

Checkpoints go to ``checkpoints/<step>/``, exported adapters to ``epochN/`` or ``stepN/``, each
folder complete or not there. What cannot be written is said and tried again when the next is due;
only a run that ends without it has failed.
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wan22_jax import processes
from wan22_jax.adapter import make_adapter
from wan22_jax.adapter_file import write_proven
from wan22_jax.checkpoint import (
    FULL_DISK_REMEDY,
    Checkpoints,
    FullDisk,
    flatten_state,
    list_steps,
    read_meta,
    remove_checkpoint,
)
from wan22_jax.config import TrainConfig, dump_config
from wan22_jax.errors import BadInput, is_full_disk
from wan22_jax.full_file import make_metadata, write_full
from wan22_jax.model_tensors import GatheredTensors
from wan22_jax.stopping import Wish
from wan22_jax.training.averages import evaluation_weights
from wan22_jax.training.cadence import Due
from wan22_jax.training.metrics import NonFiniteLoss
from wan22_jax.training.retention import Retention, choose_superfluous
from wan22_jax.training.step import TrainState

ADAPTER_FILE, FULL_FILE = "adapter_model.safetensors", "model.safetensors"
_PARTIAL, _REPLACED = ".partial", ".replaced"


@contextlib.contextmanager
def name_checkpoint(checkpoints: Checkpoints) -> Iterator[None]:
    """Adds to the error of a loss that is not finite what the run can go on from."""
    try:
        yield
    except NonFiniteLoss as error:
        raise BadInput(f"{error}; {checkpoints.describe_last()}") from None


class Saver:
    """Saves one run; what fails on the way is said, what fails at the end is raised."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: TrainConfig,
        config_name: str,
        meta: dict[str, Any],
        retention: Retention,
        *,
        say: Callable[[str], None],
    ):
        """Removes what a killed run left half-written.

        Args:
            checkpoints: of the run.
            config: of the run.
            config_name: what the copy of the config beside an adapter is called.
            meta: what each checkpoint says of the run.
            retention: which checkpoints stay.
            say: prints a line.
        """
        self._checkpoints = checkpoints
        self._run_dir = checkpoints.directory.parent
        self._config, self._config_name, self._meta = config, config_name, meta
        self._retention = retention
        self._say = say
        self._failed: dict[str, BadInput] = {}  # of the last checkpoint and the last adapter
        if not processes.is_main():
            return
        for pattern in (f".*{_PARTIAL}", f".*{_REPLACED}"):
            for rest in self._run_dir.glob(pattern):
                shutil.rmtree(rest, ignore_errors=True)

    def save(
        self, state: TrainState, due: Due, wish: Wish, *, eval_loss: float | None = None
    ) -> None:
        """Writes what is due after a step, what a user wants, and a state better than all before.

        Args:
            state: sound: its last step's loss was finite.
            due: see ``Cadence``.
            wish: see ``Wishes``.
            eval_loss: of this very state, if it was evaluated.
        """
        self.check()
        for name in due.exports:
            self.export(state, name)
        is_best = eval_loss is not None and self.improves(eval_loss)
        if due.checkpoint or wish.checkpoint or is_best:
            self.checkpoint(state, eval_loss=eval_loss)

    def check(self) -> None:
        """Says so if a checkpoint that was under way has failed."""
        self._settle(self._checkpoints.check)

    def checkpoint(self, state: TrainState, *, eval_loss: float | None = None) -> None:
        """Starts a checkpoint; ``eval_loss`` is that of this very state, if it was evaluated."""
        meta = self._meta | {"eval_loss": eval_loss}
        if processes.count() > 1:  # they may hear of a failure at different times, but not here
            self._settle(self._checkpoints.wait)
        self._failed.pop("checkpoint", None)
        self._settle(lambda: self._checkpoints.save(state, meta, prune=self._prune))
        if "checkpoint" not in self._failed:
            step = int(state.step)
            self._say(f"step {step}: saving {self._checkpoints.directory / str(step)}")

    def improves(self, eval_loss: float) -> bool:
        """Whether the best checkpoint is to stay and this loss is below those of all of them."""
        if not self._retention.best:
            return False
        self._settle(self._checkpoints.wait)  # one that is under way counts

        def read_best() -> float:
            known = [loss for loss in self._read_losses().values() if loss is not None]
            return min(known, default=math.inf)

        return eval_loss < processes.from_main(read_best, "best")

    def export(self, state: TrainState, name: str) -> None:
        """Writes the adapter and the config to a folder of the run, in place of one so called.

        Of several processes the first writes, the others hand over what it has not.
        """
        weights = GatheredTensors(flatten_state(evaluation_weights(state)))
        step = int(state.step)

        def write() -> str | None:
            try:
                return self._export(weights, name, step)
            finally:
                weights.finish()

        if not processes.is_main():
            weights.finish()
        problem = processes.from_main(write, "export")
        if problem is None:
            self._failed.pop("export", None)
        else:
            self._fail("export", BadInput(problem))

    def _export(self, weights: GatheredTensors, name: str, step: int) -> str | None:
        """Returns why nothing was written, None if it was."""
        folder = self._run_dir / name
        partial = self._run_dir / f".{name}{_PARTIAL}"
        replaced = self._run_dir / f".{name}{_REPLACED}"
        meta = self._meta | {"step": step}
        try:
            file = self._write_trained(weights, partial, meta, source=str(folder))
            (partial / self._config_name).write_text(dump_config(self._config), "utf-8")
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
        except (BadInput, OSError) as error:
            if isinstance(error, OSError) and not is_full_disk(error):
                raise
            what = error if isinstance(error, BadInput) else "the disk is full"
            return f"{folder}: was not saved ({what})"
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
        self._say(f"step {step}: saved {folder / file}")
        return None

    def _write_trained(
        self, weights: GatheredTensors, folder: Path, meta: dict[str, Any], *, source: str
    ) -> str:
        """Writes the adapter, or all weights; returns the file's name."""
        if self._config.adapter is None:
            dtype = str(self._config.save_dtype or self._config.model.dtype)
            write_full(weights, folder / FULL_FILE, dtype=dtype, metadata=make_metadata(meta))
            return FULL_FILE
        matrices = {name: weights.read(name) for name in weights.shapes}
        write_proven(make_adapter(matrices, meta, source=source), folder / ADAPTER_FILE)
        return ADAPTER_FILE

    def finish(self) -> None:
        """Waits for what is under way.

        Raises:
            BadInput: the last checkpoint or adapter could not be written.
        """
        self._settle(self._checkpoints.wait)
        for error in self._failed.values():
            raise BadInput(f"{error}; {FULL_DISK_REMEDY}")

    def _settle(self, action: Callable[[], None]) -> None:
        try:
            action()
        except FullDisk as error:
            self._fail("checkpoint", error)

    def _fail(self, what: str, error: BadInput) -> None:
        self._failed[what] = error
        self._say(f"warning: {error}; training goes on, the next save tries again")

    def _prune(self) -> None:
        if self._retention.last is not None:
            for step in choose_superfluous(self._read_losses(), self._retention):
                remove_checkpoint(self._checkpoints.directory, step)

    def _read_losses(self) -> dict[int, float | None]:
        losses = {}
        for step in list_steps(self._checkpoints.directory):
            losses[step] = None
            with contextlib.suppress(BadInput):  # damaged
                losses[step] = read_meta(self._checkpoints.directory / str(step)).get("eval_loss")
        return losses
