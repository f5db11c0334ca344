"""Where does a run keep its things, and may it go on with those of an earlier one?"""

import logging
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wan22_jax.checkpoint import find_run, read_meta
from wan22_jax.config import TrainConfig, dump_config
from wan22_jax.data.loader import Loader
from wan22_jax.errors import BadInput
from wan22_jax.model_folder import ModelCard

log = logging.getLogger(__name__)


def describe_run(config: TrainConfig, card: ModelCard, loader: Loader) -> dict[str, Any]:
    """Makes what every checkpoint of the run says of it, beside its step."""
    rank = alpha = None  # where all weights train
    if config.adapter is not None:
        rank = config.adapter.rank
        alpha = float(rank if config.adapter.alpha is None else config.adapter.alpha)
    return {
        "rank": rank,
        "alpha": alpha,
        "base_digest": card.digests["transformer"],
        "seed": config.seed,
        "steps_per_epoch": loader.steps_per_epoch,
        "config": config.model_dump(exclude_none=True),
    }


def open_run(
    config: TrainConfig, config_file: Path, *, resume: bool | str, meta: dict[str, Any]
) -> Path:
    """Makes a new run folder with its configs, or returns the one to resume.

    Raises:
        BadInput: there is nothing to resume, or it was trained on another base or adapter shape.
    """
    output_dir = Path(config.output_dir)
    if not resume:
        run_dir = make_run_dir(output_dir)
        (run_dir / config_file.name).write_text(dump_config(config), "utf-8")
        shutil.copy(config.dataset, run_dir)
        return run_dir
    run_dir = find_run(output_dir, resume if isinstance(resume, str) else None)
    saved = read_meta(run_dir)
    for name, what in (("base_digest", "base model"), ("rank", "rank"), ("alpha", "alpha")):
        if saved[name] != meta[name]:
            raise BadInput(
                f"{run_dir}: was trained with {what} {saved[name]}, the config has {meta[name]}; "
                "resume with the original or start a new run"
            )
    for change in _list_changes(saved, meta):
        log.info("changed since the checkpoint: %s", change)
    return run_dir


def make_run_dir(output_dir: Path) -> Path:
    """Makes a folder named after the time, in UTC."""
    while True:  # two runs that start in the same second take two names
        run_dir = output_dir / datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.1)
        else:
            return run_dir


def _list_changes(saved: dict[str, Any], meta: dict[str, Any]) -> list[str]:
    before, now = _flatten(saved), _flatten(meta)
    return [
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and name not in ("step", "version")
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat
