"""Where does a run keep its things, and may it go on with those of an earlier one?

A run folder is named after the time, in UTC, at which the run started::

    <output_dir>/20261122_19-53-16/
      <config>.toml  <dataset>.toml   as the run started, with the data sets of evaluation
      <prompts>.txt                   and the prompts of previews, if they are in a file
      epochN/  stepN/                 exported adapters, each with the config
      checkpoints/<step>/             training state
      samples/step00000500/00.mp4     previews
      events.out.tfevents.*           curves
      save  save_quit                 made by a user, see ``stopping``
"""

import logging
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from wan22_jax.adapter_targets import TARGETS, describe_targets, parse_targets
from wan22_jax.checkpoint import find_run
from wan22_jax.config import TrainConfig, dump_config, load_dataset
from wan22_jax.data.loader import Loader
from wan22_jax.errors import BadInput
from wan22_jax.model_folder import ModelCard
from wan22_jax.outputs import check_folder
from wan22_jax.resuming import (
    NOTHING,
    Reset,
    Start,
    choose_checkpoint,
    choose_start,
    compare,
    list_changes,
)

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run's folder, where in the run to start, and what its checkpoints say of it."""

    folder: Path
    start: Start
    meta: dict[str, Any]


def describe_run(config: TrainConfig, card: ModelCard, loader: Loader) -> dict[str, Any]:
    """Makes what every checkpoint of the run says of it, beside its step and start."""
    return {
        # None where all weights train.
        "targets": describe_targets(config.lora_targets) if config.adapter else None,
        "base_digest": card.digests["transformer"],
        "seed": config.seed,
        "steps_per_epoch": loader.steps_per_epoch,
        "config": config.model_dump(exclude_none=True),
        "parallel": config.parallel.split._asdict(),
        "dataset": load_dataset(Path(config.dataset)).model_dump(exclude_none=True),
    }


def open_run(
    config: TrainConfig,
    config_file: Path,
    *,
    resume: bool | str,
    meta: dict[str, Any],
    reset: Reset = NOTHING,
) -> Run:
    """Makes a new run folder with its configs, or opens the one to resume.

    Raises:
        BadInput: there is nothing to resume, no checkpoint is sound, or it was trained on another
            base or adapter shape.
    """
    output_dir = Path(config.output_dir)
    if not resume:
        if any(reset):
            raise BadInput(
                "--reset_optimizer, --reset_optimizer_params and --reset_dataloader say how a run "
                "goes on; add --resume_from_checkpoint"
            )
        folder, start = make_run_dir(output_dir), Start()
        (folder / config_file.name).write_text(dump_config(config), "utf-8")
        files = [("train", Path(config.dataset)), *config.eval_sets.items()]
        if config.sample is not None and isinstance(config.sample.prompts, str):
            files.append(("sample", Path(config.sample.prompts)))
        for name, file in files:
            is_taken = (folder / file.name).exists()
            shutil.copy(file, folder / (f"{name}_{file.name}" if is_taken else file.name))
    else:
        folder = find_run(output_dir, resume if isinstance(resume, str) else None)
        saved = choose_checkpoint(folder)
        _check_same(folder, saved, meta)
        for change in list_changes(saved, meta):
            log.info("changed since the checkpoint: %s", change)
        start = choose_start(saved, steps_per_epoch=meta["steps_per_epoch"], reset=reset)
    progress = {"data_offset": start.data_offset, "schedule_start": start.schedule_start}
    return Run(folder, start, meta | progress)


def _check_same(folder: Path, saved: dict[str, Any], meta: dict[str, Any]) -> None:
    if saved["base_digest"] != meta["base_digest"]:
        raise BadInput(
            f"{folder}: was trained with base model {saved['base_digest']}, the config has "
            f"{meta['base_digest']}; resume with the original or start a new run"
        )
    before = describe_targets(parse_targets(saved, TARGETS))
    if changes := compare(before, meta["targets"] or {}):
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        raise BadInput(
            f"{folder}: was trained with other ranks or alphas than [adapter] has now "
            f"({changes[0]}{more}); resume with the original or start a new run"
        )


def make_run_dir(output_dir: Path) -> Path:
    """Makes a folder named after the time, in UTC; BadInput if it cannot be made."""
    check_folder(output_dir)
    while True:  # two runs that start in the same second take two names
        run_dir = output_dir / datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.1)
        else:
            return run_dir
