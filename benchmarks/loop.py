"""What does the training loop cost beside the train step: loader, progress, logs, checkpoints?

Runs wan22-train itself on a cache of random latents. Only what reads the model folder is replaced,
by the random weights of the other benchmarks, so that none has to lie on a disk. In the same
process, on the program and the arrays of that run, the bare step is timed before and after: steps
dispatched one ahead, on one batch, with nothing between. Prints one line of JSON after the word
RESULT; ``lost_percent`` is what the loop adds to the bare step.

    python benchmarks/loop.py                    # 512x512x33, float8: about 0.1 s a step on an H100
    python benchmarks/loop.py --tiny --steps 12  # does it run, on a CPU
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import tomli_w
from random_model import TINY, add_step_arguments, make_model

from wan22_jax import start
from wan22_jax import train as train_command
from wan22_jax.data.cache import CACHE_FOLDER, make_latents_key, make_text_key, name_encoders
from wan22_jax.data.cache_writer import open_writer
from wan22_jax.data.index import ClipEntry
from wan22_jax.data.loader import Loader
from wan22_jax.geometry import LATENT_CHANNELS, Bucket, check_bucket
from wan22_jax.model.transformer import TI2V_5B, TransformerConfig
from wan22_jax.model.umt5 import UMT5_XXL
from wan22_jax.model.vae import WAN22_VAE
from wan22_jax.model_folder import ModelCard
from wan22_jax.training.flops import count_flops

NUM_CLIPS = 32
TEXT_TOKENS = 200  # of a long caption
WARM_STEPS = 8  # after compiling, before anything is timed


class Watch:
    """The run's own step, wrapped: when each step was dispatched, and with what."""

    def __init__(self, step: Callable[..., Any], *, bare_steps: int):
        self._step, self._bare_steps = step, bare_steps
        self.dispatched_at: list[float] = []
        self.dispatch_s: list[float] = []
        self.bare_s: list[float] = []
        self._last: tuple[Any, ...] = ()

    def __call__(self, state: Any, *rest: Any) -> Any:
        """Runs the step; when the run has warmed up, the bare steps on a copy come first."""
        if len(self.dispatched_at) == WARM_STEPS:
            copy = jax.tree.map(lambda leaf: jax.device_put(jnp.copy(leaf), leaf.sharding), state)
            self.time_bare_steps(copy, *rest)
        start = time.perf_counter()
        result = self._step(state, *rest)
        self.dispatched_at.append(start)
        self.dispatch_s.append(time.perf_counter() - start)
        self._last = (result[0], *rest)
        return result

    def time_again(self) -> None:
        """Times the bare step once more, from where the run ended."""
        self.time_bare_steps(*self._last)

    def time_bare_steps(self, state: Any, *rest: Any) -> None:
        """Times steps with nothing between; the state is used up."""
        state, metrics = self._step(state, *rest)
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        for _ in range(self._bare_steps):
            waited_for = metrics
            state, metrics = self._step(state, *rest)
            jax.block_until_ready(waited_for)
        jax.block_until_ready(metrics)
        self.bare_s.append((time.perf_counter() - start) / self._bare_steps)


def main() -> None:
    args = parse_arguments()
    # The loader pads texts to the length that the real model has.
    config = dataclasses.replace(TINY, text_len=TI2V_5B.text_len) if args.tiny else TI2V_5B
    bucket = check_bucket(Bucket(*map(int, args.bucket.split("x"))), source="--bucket")
    card = ModelCard(
        dtype=args.dtype,
        source="random",
        transformer=config,
        vae=WAN22_VAE,
        text_encoder=UMT5_XXL,
        digests={"transformer": "random", "vae": "random", "text_encoder": "random"},
        digest="random",
    )
    with tempfile.TemporaryDirectory(prefix="loop_") as name:
        folder = Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # a cold start, nothing kept
        write_cache(folder / "clips", card, config, bucket)
        watch, waits = drive(folder, card, config, args, bucket)
        saved = sum(1 for _ in folder.glob("runs/*/checkpoints/*"))
    first, save_at = WARM_STEPS + 1, args.steps
    plain = np.diff(watch.dispatched_at[first:save_at])
    around_save = np.diff(watch.dispatched_at[save_at - 1 :])
    step_s, bare_s = float(plain.mean()), statistics.mean(watch.bare_s)
    device = jax.local_devices()[0]
    result = {
        "program": "loop",
        "bucket": args.bucket,
        "tokens": bucket.num_tokens * args.batch,
        "dtype": args.dtype,
        "activation_checkpointing": args.activation_checkpointing,
        "steps": len(plain),
        "loop_s": round(step_s, 5),
        "bare_s": round(bare_s, 5),
        "bare_s_all": [round(value, 5) for value in watch.bare_s],
        "lost_percent": round(100 * (step_s / bare_s - 1), 2),
        "loop_median_s": round(float(np.median(plain)), 5),
        "loop_max_s": round(float(plain.max()), 5),
        "loader_wait_s": round(statistics.mean(waits[first:save_at]), 6),
        "loader_wait_max_s": round(max(waits[first:save_at]), 6),
        "dispatch_s": round(statistics.mean(watch.dispatch_s[first:save_at]), 6),
        "checkpoints": saved,
        # What a save adds to the steps during which it goes on.
        "save_s": round(float(around_save.sum()) - bare_s * len(around_save), 3),
        "model_tflops": round(
            count_flops(config, bucket.num_tokens) * args.batch / step_s / 1e12, 1
        ),
        "device": device.device_kind,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
    }
    print("RESULT " + json.dumps(result), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser)
    parser.set_defaults(
        bucket="512x512x33", dtype="float8", activation_checkpointing="keep_matmuls"
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="after which it saves; a quarter more follow"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to check the program")
    args = parser.parse_args()
    if args.tiny:
        args.bucket = "64x64x5"
    return args


def write_cache(folder: Path, card: ModelCard, config: TransformerConfig, bucket: Bucket) -> None:
    """Fills a cache as wan22-cache does, with white noise."""
    rng = np.random.default_rng(0)
    encoders = name_encoders(card.digests, vae_dtype="bfloat16")
    entries = []
    with open_writer(folder / CACHE_FOLDER, encoders=encoders) as writer:
        for number in range(NUM_CLIPS):
            caption = f"caption {number}"
            entry = ClipEntry(
                f"{number}.mp4",
                bucket,
                make_latents_key(f"{number}", bucket),
                (make_text_key(caption),),
            )
            shape = (*bucket.latent_TYX, LATENT_CHANNELS)
            writer.add(entry.latents_key, rng.standard_normal(shape, np.float32))
            size = (min(TEXT_TOKENS, config.text_len), config.text_dim)
            writer.add(entry.text_keys[0], rng.standard_normal(size, np.float32))
            entries.append(entry)
        writer.finish(entries, buckets=[bucket])


def drive(
    folder: Path,
    card: ModelCard,
    config: TransformerConfig,
    args: argparse.Namespace,
    bucket: Bucket,
) -> tuple[Watch, list[float]]:
    """Runs wan22-train; returns what was watched and how long each step waited for the loader."""
    num_steps = args.steps + args.steps // 4
    settings = {
        "output_dir": str(folder / "runs"),
        "dataset": str(folder / "dataset.toml"),
        "epochs": num_steps,  # more than enough
        "max_steps": num_steps,
        "micro_batch_size_per_gpu": args.batch,
        "activation_checkpointing": args.activation_checkpointing,
        "blocks_to_swap": args.blocks_to_swap,
        "warmup_steps": 100,
        "checkpoint_every_n_steps": args.steps,
        "model": {"ckpt_path": str(folder), "transformer_dtype": args.dtype},
        "adapter": {"type": "lora", "rank": 32},
        "optimizer": {"type": "adamw", "lr": 1e-5},
    }
    (folder / "lora.toml").write_text(tomli_w.dumps(settings))
    directory = {"path": str(folder / "clips")}
    dataset = {"size_buckets": [list(bucket)], "directory": [directory]}
    (folder / "dataset.toml").write_text(tomli_w.dumps(dataset))

    watches: list[Watch] = []
    waits: list[float] = []
    compile_step, iterate = train_command.compile_train_step, Loader.iterate

    def compile_watched(*positional: Any, **options: Any) -> Watch:
        step = compile_step(*positional, **options)
        watches.append(Watch(step, bare_steps=args.steps // 2))
        return watches[0]

    def iterate_timed(self: Loader, first_step: int) -> Iterator[Any]:
        steps = iterate(self, first_step)
        while True:
            start = time.perf_counter()
            item = next(steps)
            waits.append(time.perf_counter() - start)
            yield item

    train_command.compile_train_step = compile_watched
    train_command.read_model_card = lambda _: card
    start.load_transformer = lambda *_, **__: make_model(config, dtype=args.dtype, on_host=True)
    Loader.iterate = iterate_timed
    # With its log lines, progress line, event file and status, as a user starts it.
    if code := train_command.main(["--config", str(folder / "lora.toml")]):
        raise SystemExit(code)
    watches[0].time_again()
    return watches[0], waits


if __name__ == "__main__":
    main()
