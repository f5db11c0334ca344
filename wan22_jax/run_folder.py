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
import socket
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from wan22_jax import processes
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

SEEN_S = 30  # that a network disk may take to show a new folder to other hosts
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
        "global_batch": config.global_batch,
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

    Of several processes one does; the others are told, and have to see the folder.

    Raises:
        BadInput: there is nothing to resume, no checkpoint is sound, it was trained on another
            base or adapter shape, or another process does not see it or wants something else.
    """
    check_alike(dump_config(config), f"--resume_from_checkpoint {resume}", f"{reset}")

    def choose() -> tuple[str, Start]:
        folder, start = _choose(config, config_file, resume=resume, meta=meta, reset=reset)
        return str(folder), start

    name, start = processes.from_main(choose, "run")
    folder, start = Path(name), Start(*start)
    check_seen(folder)
    progress = {"data_offset": start.data_offset, "schedule_start": start.schedule_start}
    return Run(folder, start, meta | progress)


def _choose(
    config: TrainConfig,
    config_file: Path,
    *,
    resume: bool | str,
    meta: dict[str, Any],
    reset: Reset,
) -> tuple[Path, Start]:
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
        start = choose_start(
            saved,
            steps_per_epoch=meta["steps_per_epoch"],
            global_batch=meta["global_batch"],
            reset=reset,
        )
    return folder, start


def check_alike(*settings: str) -> None:
    """Raises BadInput in all processes if they were started with different settings."""
    for process, others in enumerate(processes.gather(settings, "settings")):
        for ours, theirs in zip(settings, others, strict=True):
            differing = sorted(set(ours.splitlines()) ^ set(theirs.splitlines()))
            if differing:
                raise BadInput(
                    f"process {process} was started with other settings than process "
                    f"{processes.index()} ({differing[0]}); give all the same config and flags"
                )


def check_seen(folder: Path) -> None:
    """Raises BadInput in all processes if one of them does not see what process 0 writes."""
    if processes.count() == 1:
        return

    def mark() -> str:
        # A name that was never there: a folder of the same name may be on another disk.
        mark = folder / f".{uuid.uuid4().hex}"
        mark.touch()
        return mark.name

    mark_file = folder / processes.from_main(mark, "mark")
    problem, deadline = None, time.monotonic() + SEEN_S
    while not mark_file.exists():
        if time.monotonic() > deadline:
            problem = (
                f"{folder.absolute()} on {socket.gethostname()}: is not the folder that process 0 "
                "writes to; set output_dir to a folder on a disk that all hosts share"
            )
            break
        time.sleep(0.1)
    try:
        processes.agree(problem, "seen")
    finally:
        if processes.is_main():
            mark_file.unlink(missing_ok=True)


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
