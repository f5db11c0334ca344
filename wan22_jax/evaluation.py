"""On which data sets does a run evaluate, and with what?"""

from functools import partial
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import NamedSharding

from wan22_jax.config import TrainConfig, load_dataset
from wan22_jax.data.cache import name_encoders
from wan22_jax.data.eval_clips import EvalSet
from wan22_jax.dataset import open_caches, read_datasets
from wan22_jax.errors import BadInput
from wan22_jax.examples import make_grid
from wan22_jax.model_folder import ModelCard
from wan22_jax.training.averages import evaluation_weights
from wan22_jax.training.evaluate import Evaluator
from wan22_jax.training.metrics import Progress
from wan22_jax.training.step import Frozen, TrainState


def open_eval_sets(config: TrainConfig, card: ModelCard) -> dict[str, EvalSet]:
    """Opens the caches of the evaluation data sets, by the names of their curves.

    Raises:
        BadInput: as ``open_caches``; a file asks for what would make evaluations differ; or it
            shares a folder with another one that wants it otherwise.
    """
    files = [Path(config.dataset), *config.eval_sets.values()]
    read_datasets(files, clip_mode=config.video_clip_mode)
    encoders = name_encoders(card.digests, vae_dtype=config.model.vae_dtype)
    sets = {}
    for name, file in config.eval_sets.items():
        _check_whole(file)
        caches = open_caches(file, encoders=encoders, clip_mode=config.video_clip_mode)
        sets[name] = EvalSet(caches, batching=config.eval_batching)
    return sets


def make_evaluator(
    config: TrainConfig,
    sets: dict[str, EvalSet],
    *,
    graphdef: nnx.GraphDef,
    frozen: Frozen,
    sharding: NamedSharding,
) -> Evaluator | None:
    """Makes what evaluates the sets of ``open_eval_sets``, or None if there are none.

    Args:
        config: of the run.
        sets: by name.
        graphdef: structure of the model, from ``split_model``.
        frozen: the base weights, from ``place_frozen``.
        sharding: of what is put on the device.
    """
    if not sets:
        return None
    return Evaluator(
        sets,
        graphdef=graphdef,
        frozen=frozen,
        penalty=config.penalty,
        make_grid=partial(make_grid, config),
        evaluates_i2v=config.eval_i2v,
        gathers_blocks=config.disable_block_swap_for_eval,
        sharding=sharding,
    )


def evaluate(evaluator: Evaluator, state: TrainState, progress: Progress, step: int) -> float:
    """Evaluates the state that ``step`` steps made; logs it; returns ``Evaluator.score`` of it.

    Raises:
        BadInput: memory runs out.
    """
    progress.flush()
    try:
        values = evaluator(evaluation_weights(state), state.ema)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise BadInput(
            f"out of GPU memory in the evaluation at step {step}; set "
            "eval_micro_batch_size_per_gpu = 1, and leave out disable_block_swap_for_eval"
        ) from error
    progress.add_scalars(values, step)
    score = evaluator.score(values)
    progress.say(f"step {step}: evaluation loss {score:.4f}")
    return score


def _check_whole(file: Path) -> None:
    dataset = load_dataset(file)
    for key in ("subsample_ratio", "uncond_fraction"):
        if getattr(dataset, key) is not None:
            raise BadInput(
                f"{file}: {key}: an evaluation takes every clip, with its caption; leave it out"
            )
