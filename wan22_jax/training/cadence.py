"""What is due after a step: an evaluation, a checkpoint, an exported adapter, previews?

Keys that count examples count whole steps: as many as have that many examples, rounded down.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from wan22_jax.config import TrainConfig
from wan22_jax.errors import BadInput
from wan22_jax.sample_config import SampleConfig


class Due(NamedTuple):
    """What to do after a step."""

    evaluate: bool
    checkpoint: bool
    exports: tuple[str, ...]  # names of folders: epoch3, step200
    preview: bool = False


class Cadence:
    """The config's ``*_every_n_*`` keys."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        examples_per_step: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Reads the config; minutes count from now on.

        Args:
            config: of the run.
            examples_per_step: of all micro-batches together.
            clock: in seconds.

        Raises:
            BadInput: a step has more examples than a key asks for.
        """

        def steps(key: str) -> int | None:
            examples = getattr(config, key)
            if examples is not None and examples < examples_per_step:
                raise BadInput(
                    f"{key} = {examples}: one step takes {examples_per_step} examples "
                    "(micro_batch_size_per_gpu x gradient_accumulation_steps); give at least that"
                )
            return None if examples is None else examples // examples_per_step

        self._save_steps = (config.save_every_n_steps, steps("save_every_n_examples"))
        self._save_epochs = config.save_every_n_epochs
        self._checkpoint_steps = (config.checkpoint_every_n_steps,)
        self._checkpoint_epochs = config.checkpoint_every_n_epochs
        self._checkpoint_minutes = config.checkpoint_every_n_minutes
        self._eval_steps = (config.eval_every_n_steps, steps("eval_every_n_examples"))
        self._eval_epochs = config.eval_every_n_epochs
        self._sample = config.sample
        self._clock = clock
        self._checkpointed_at = clock()

    def is_late(self) -> bool:
        """Whether the last checkpoint is ``checkpoint_every_n_minutes`` ago, by this clock."""
        minutes = (self._clock() - self._checkpointed_at) / 60
        return self._checkpoint_minutes is not None and minutes >= self._checkpoint_minutes

    def after(
        self,
        step: int,
        epoch: int,
        *,
        ends_epoch: bool,
        ends_run: bool,
        late: bool | None = None,
    ) -> Due:
        """Says what is due, and takes it for done.

        Args:
            step: counted from 1.
            epoch: counted from 1.
            ends_epoch: this was the epoch's last step.
            ends_run: this was the last step: whatever else is due, all that was trained is kept.
            late: what counts instead of ``is_late()``, where several processes have agreed.
        """
        by_epoch = ends_epoch and _divides(self._save_epochs, epoch)
        by_step = any(_divides(n, step) for n in self._save_steps)
        if ends_run and not by_step:
            by_epoch, by_step = ends_epoch, not ends_epoch
        exports = (f"epoch{epoch}",) * by_epoch + (f"step{step}",) * by_step
        checkpoint = (
            ends_run
            or any(_divides(n, step) for n in self._checkpoint_steps)
            or (ends_epoch and _divides(self._checkpoint_epochs, epoch))
            or (self.is_late() if late is None else late)
        )
        if checkpoint:
            self._checkpointed_at = self._clock()
        evaluate = any(_divides(n, step) for n in self._eval_steps) or (
            ends_epoch and _divides(self._eval_epochs, epoch)
        )
        preview = self._sample is not None and (
            _divides(self._sample.every_n_steps, step)
            or (ends_epoch and _divides(self._sample.every_n_epochs, epoch))
        )
        return Due(evaluate, checkpoint, exports, preview)


def is_preview_ahead(
    sample: SampleConfig, first_step: int, last_step: int, *, offset: int, steps_per_epoch: int
) -> bool:
    """Whether ``Cadence`` finds previews due after a step in (first_step, last_step].

    Args:
        sample: the table.
        first_step: steps that are done.
        last_step: steps after which the run ends.
        offset: an epoch ends where ``steps_per_epoch`` divides the step plus this.
        steps_per_epoch: of the loader.
    """
    every_steps, every_epochs = sample.every_n_steps, sample.every_n_epochs
    by_step = every_steps and last_step // every_steps > first_step // every_steps
    every = (every_epochs or 0) * steps_per_epoch
    by_epoch = every and (last_step + offset) // every > (first_step + offset) // every
    return bool(by_step or by_epoch)


def _divides(every: int | None, count: int) -> bool:
    return every is not None and count % every == 0
