"""A run that takes seconds on the CPU: a tiny model, random latents, two buckets, captions."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from convert.weights import convert
from wan22_jax.checkpoint import FOLDER, list_steps, read_arrays, read_meta
from wan22_jax.data.cache import CACHE_FOLDER, make_latents_key, make_text_key, name_encoders
from wan22_jax.data.cache_writer import open_writer
from wan22_jax.data.index import ClipEntry
from wan22_jax.demo_checkpoint import TINY_TEXT_ENCODER, write_checkpoint
from wan22_jax.geometry import LATENT_CHANNELS, Bucket

BUCKETS = {Bucket(32, 32, 5): 5, Bucket(32, 64, 5): 4}  # and how many clips there are
CONFIG = """
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 2
gradient_accumulation_steps = 2
checkpoint_every_n_steps = 1
uncond_fraction = 0.3
warmup_steps = 3
[model]
ckpt_path = 'model'
dtype = 'float32'
[adapter]
rank = 2
[optimizer]
lr = 1e-2
"""
STEPS_PER_EPOCH = 4  # two of each bucket; a clip of the first is left out
DATASET = f"size_buckets = {[list(bucket) for bucket in BUCKETS]}\n[[directory]]\npath = 'clips'\n"


@contextmanager
def keep_programs(folder: Path) -> Iterator[None]:
    """Has JAX keep what it compiles in a folder, however small, inside of this context."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def prepare(folder: Path) -> None:
    """Makes model, cache and configs in a folder."""
    (folder / "lora.toml").write_text(CONFIG)
    (folder / "dataset.toml").write_text(DATASET)
    write_checkpoint(folder / "checkpoint", captions=["a cat"])
    card = convert(folder / "checkpoint", folder / "model")
    write_cache(folder / "clips", card.digests)


def write_cache(folder: Path, digests: dict[str, str], *, broken: str | None = None) -> None:
    """Makes the cache of a folder of clips; the clip so called has NaNs in it."""
    rng = np.random.default_rng(0)
    entries = []
    encoders = name_encoders(digests, vae_dtype="bfloat16")
    with open_writer(folder / CACHE_FOLDER, encoders=encoders) as writer:
        for bucket, count in BUCKETS.items():
            for number in range(count):
                name = f"{number}_{bucket.width_px}x{bucket.height_px}"
                latents = rng.standard_normal((*bucket.latent_TYX, LATENT_CHANNELS), np.float32)
                latents[:] = np.nan if name == broken else latents
                key, caption = make_latents_key(name, bucket), make_text_key(name)
                writer.add(key, latents)
                writer.add(caption, rng.standard_normal((3, TINY_TEXT_ENCODER.dim), np.float32))
                entries.append(ClipEntry(f"{name}.mp4", bucket, key, (caption,)))
        writer.add(make_text_key(""), rng.standard_normal((1, TINY_TEXT_ENCODER.dim), np.float32))
        writer.finish(entries, buckets=list(BUCKETS))


def digest_state(run_dir: Path, step: int | None = None) -> tuple[int, str]:
    """Returns the step of a checkpoint, the newest by default, and a hash of all its arrays."""
    folder = run_dir / FOLDER
    step = max(list_steps(folder)) if step is None else step
    digests = []
    for item, described in read_meta(folder / str(step))["arrays"].items():
        digests.append(hash_arrays(read_arrays(folder / str(step), item, described)))
    return step, " ".join(digests)


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Hashes names and bits."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + np.asarray(array).tobytes())
    return digest.hexdigest()
