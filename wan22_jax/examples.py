"""What does step k of a run train on: which clips, captions, noise levels and tasks?"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from wan22_jax.config import TrainConfig, load_dataset
from wan22_jax.data.cache import Cache, name_encoders
from wan22_jax.data.loader import Loader, make_loader
from wan22_jax.dataset import choose_uncond_fraction, open_caches
from wan22_jax.errors import BadInput
from wan22_jax.geometry import LATENT_CHANNELS, Bucket
from wan22_jax.model.flow import flux_shift, sigma_grid
from wan22_jax.model_folder import ModelCard
from wan22_jax.training.draws import IMAGE_TO_VIDEO, draw_examples
from wan22_jax.training.step import split_seed

Caches = Sequence[tuple[Cache, float | int]]


def open_training_caches(config: TrainConfig, card: ModelCard) -> Caches:
    """Opens the caches of the data set, each with its ``num_repeats``; see ``open_caches``."""
    encoders = name_encoders(card.digests, vae_dtype=config.model.vae_dtype)
    dataset = Path(config.dataset)
    return open_caches(dataset, encoders=encoders, clip_mode=config.video_clip_mode)


def open_loader(
    config: TrainConfig, caches: Caches, *, own: tuple[range, int] = (range(1), 1)
) -> Loader:
    """Opens what a run reads its steps from.

    Args:
        config: of the run; its ``parallel`` says how many clips are taken at a time.
        caches: from ``open_training_caches``.
        own: see ``make_loader``.

    Raises:
        BadInput: as ``make_loader``.
    """
    dataset = Path(config.dataset)
    return make_loader(
        caches,
        seed=config.seed,
        batching=config.batching,
        subsample_ratio=load_dataset(dataset).subsample_ratio,
        uncond_fraction=choose_uncond_fraction(dataset, in_main_file=config.uncond_fraction),
        own=own,
    )


def count_tokens(config: TrainConfig, caches: Caches) -> int:
    """Returns how many tokens the largest micro-batch of one device has."""
    buckets = {bucket for cache, _ in caches for bucket in cache.clips.buckets}
    batching = config.batching._replace(num_shards=1)
    return max((bucket.num_tokens * batching.micro_batch(bucket) for bucket in buckets), default=0)


def make_grid(config: TrainConfig, bucket: Bucket) -> jax.Array:
    """Makes the noise levels that training draws from in this bucket."""
    model = config.model
    shift = model.shift or 1.0
    if model.flux_shift and not model.shift:
        shift = flux_shift(bucket._replace(frames=1).num_tokens)
    try:
        grid = sigma_grid(
            method=model.timestep_sample_method,
            sigmoid_scale=model.sigmoid_scale,
            shift=shift,
            min_t=model.min_t,
            max_t=model.max_t,
        )
    except ValueError as error:
        raise BadInput(f"[model]: {error}") from None
    return jnp.asarray(grid)


def describe_step(config: TrainConfig, loader: Loader, step: int) -> list[str]:
    """Returns lines that say what a step trains on, one for each example of its global batch.

    Args:
        config: of the run.
        loader: from ``open_loader`` of the same config.
        step: counted from 0; what is printed counts from 1, as logs and checkpoints do.
    """
    bucket, chosen = loader.choose(step)
    _, draw_key = split_seed(config.seed)

    @jax.jit  # which leaves out the noise
    def draw() -> tuple[jax.Array, jax.Array]:
        draws = draw_examples(
            jax.random.fold_in(draw_key, step),
            jnp.arange(len(chosen)),
            sigma_grid=make_grid(config, bucket),
            shape_TYXC=(*bucket.latent_TYX, LATENT_CHANNELS),
            tasks=config.tasks,
        )
        return draws.sigma, draws.task

    sigma_B, task_B = map(np.asarray, draw())
    micro_batch = config.batching.micro_batch(bucket)
    epoch, position = divmod(step, loader.steps_per_epoch)
    lines = [
        f"step {step + 1}: {bucket}, epoch {epoch + 1}, {position + 1} of {loader.steps_per_epoch}",
        f"{'micro-batch':>11} {'sigma':>7} task  clip: caption",
    ]
    for number, one in enumerate(chosen):
        task = "i2v" if task_B[number] == IMAGE_TO_VIDEO else "t2v"
        caption = "(dropped)" if one.caption is None else repr(one.read_caption())
        lines.append(
            f"{number // micro_batch + 1:>11} {sigma_B[number]:>7.4f} {task}   "
            f"{one.cache.folder.parents[1] / one.file}: {caption}"
        )
    return lines
