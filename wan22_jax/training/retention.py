"""Which checkpoints of a run stay?"""

from collections.abc import Mapping
from typing import NamedTuple

from wan22_jax.config import TrainConfig
from wan22_jax.errors import BadInput


class Retention(NamedTuple):
    """Which checkpoints stay; all of them if ``last`` is None."""

    last: int | None
    every: int | None  # those of multiples of so many steps always stay
    best: bool  # the one of lowest evaluation loss stays


def make_retention(config: TrainConfig) -> Retention:
    """Reads the config's ``keep_*`` keys.

    Raises:
        BadInput: one of them cannot do anything.
    """
    retention = Retention(
        config.keep_last_n_checkpoints, config.keep_every_n_steps, config.keep_best_checkpoint
    )
    if retention.last is None and (retention.every or retention.best):
        raise BadInput(
            "keep_every_n_steps and keep_best_checkpoint say what stays beside the last "
            "checkpoints, but all of them stay; set keep_last_n_checkpoints"
        )
    every = (config.eval_every_n_steps, config.eval_every_n_epochs, config.eval_every_n_examples)
    if retention.best and not (config.eval_datasets and any(every)):
        raise BadInput(
            "keep_best_checkpoint: the best is the one of lowest evaluation loss; set "
            "eval_datasets and eval_every_n_steps or eval_every_n_epochs"
        )
    return retention


def choose_superfluous(losses: Mapping[int, float | None], retention: Retention) -> list[int]:
    """Lists the checkpoints that need not stay; ``losses`` of all by step, None: not evaluated."""
    if retention.last is None:
        return []
    steps = sorted(losses)
    kept = set(steps[-retention.last :])
    if retention.every is not None:
        kept |= {step for step in steps if step % retention.every == 0}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    if retention.best and known:
        kept.add(min(known, key=lambda step: (known[step], step)))
    return [step for step in steps if step not in kept]
