"""How long does a train step take at real size, and how much memory?

One configuration a process: random weights of the 5B shapes, rank 32 on all ten linears of each
block, or all weights (--full), AdamW and clipping; steps as wan22-train runs them, but for reading
clips. Prints one line of JSON after the word RESULT. Needs the package installed or the
repository's root on PYTHONPATH.

    python benchmarks/train_step.py --bucket 1280x704x121 --dtype float8 \
        --activation_checkpointing unsloth --blocks_to_swap 30 --memory_gb 10
    python benchmarks/train_step.py --bucket 512x512x33 --trace profile   # and where the time goes
    python benchmarks/train_step.py --bucket 512x512x33 --full float32 --offload_optimizer
    python benchmarks/train_step.py --tiny --bucket 64x64x5               # does it run, on a CPU
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from encode import fill
from flax import nnx
from jax.sharding import NamedSharding
from kernel_table import format_kernels, read_kernels
from random_model import (
    TINY,
    add_lora,
    add_step_arguments,
    build_step,
    limit_memory,
    make_full_optimizer,
    make_model,
    masters_dtype,
    place,
    read_split,
)

from wan22_jax.batch import Batch
from wan22_jax.demo_checkpoint import TINY_VAE
from wan22_jax.geometry import Bucket, check_bucket
from wan22_jax.model.flow import sigma_grid
from wan22_jax.model.transformer import TI2V_5B, TransformerConfig
from wan22_jax.model.vae import WAN22_VAE, WanVAE
from wan22_jax.sampling import Velocity, sample_latents
from wan22_jax.sharding import claim_gpu, make_mesh, put_examples, replicated
from wan22_jax.training.flops import count_flops
from wan22_jax.training.full import place_full, split_full
from wan22_jax.training.optimizer import make_optimizer
from wan22_jax.training.optimizer_options import AdamW
from wan22_jax.training.step import Frozen, Optimizer, TrainState, init_state, split_model
from wan22_jax.velocity import make_velocity
from wan22_jax.videos import fetch_video

NUM_TRACED = 2  # steps in a profile
CACHE_HIT = "/jax/compilation_cache/cache_hits"  # JAX's event


def main() -> None:
    args = parse_arguments()
    limit_memory(None if args.tiny else args.memory_gb)
    claim_gpu(counts_host=args.full is not None)
    if args.dump:
        dump = f"--xla_dump_to={args.dump} --xla_dump_hlo_as_text"
        module = "--xla_dump_hlo_module_re=.*train_step.*"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump} {module}".strip()
    jax.config.update("jax_compilation_cache_dir", args.cache)  # None: the first step is cold

    bucket = check_bucket(Bucket(*map(int, args.bucket.split("x"))), source="--bucket")
    config = TINY if args.tiny else TI2V_5B
    split = read_split(args)
    mesh = make_mesh(split)
    sharding = replicated(mesh)
    # Drawn on the device, weights would leave it in pieces too small for what the step needs.
    on_host = args.blocks_to_swap > 0 or args.memory_gb is not None or args.full is not None
    model = make_model(config, dtype=args.dtype, on_host=on_host)
    optimizer: Optimizer = make_adamw()
    if args.full:
        optimizer = make_full_optimizer(args.full, offload=args.offload_optimizer)
        graphdef, weights, template = split_full(model, dtype=jnp.bfloat16)
        del model
        masters = place_full(weights, sharding, dtype=masters_dtype(args.full))
        del weights
        number = jnp.zeros((), jnp.int32)
        state = TrainState(number, masters, optimizer.place_state(masters))
        state = state._replace(step=jax.device_put(number, sharding))
        frozen = Frozen(jax.device_put(template, sharding))
        del masters
    else:
        add_lora(model, seed=2)
        graphdef, trainable, frozen = split_model(model)
        del model
        frozen = place(
            frozen,
            activation_checkpointing=args.activation_checkpointing,
            blocks_to_swap=args.blocks_to_swap,
            mesh=mesh,
        )
        state = jax.device_put(init_state(trainable, optimizer), sharding)
        del trainable
    grid, key = jax.device_put((sigma_grid(), jax.random.key(0)), sharding)
    num_clips = args.batch * split.batch_shards
    batch = make_batch(config, bucket, num_clips, args.accumulate)
    batch = put_examples(batch, mesh, total=num_clips)

    start = time.perf_counter()
    step = build_step(
        graphdef,
        optimizer,
        activation_checkpointing=args.activation_checkpointing,
        state=state,
        frozen=frozen,
    )
    lowered = step.lower(state, frozen, batch, key, grid)
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    step = lowered.compile()
    compile_s = time.perf_counter() - start
    is_cached = CACHE_HIT in events

    start = time.perf_counter()
    state, metrics = step(state, frozen, batch, key, grid)
    jax.block_until_ready(metrics)
    first_s = compile_s + time.perf_counter() - start
    seconds, losses = [], []
    state, metrics = step(state, frozen, batch, key, grid)
    for number in range(args.steps + 1):
        # As in training, the next step is on its way before this one is waited for.
        start, waited_for = time.perf_counter(), metrics["loss"]
        state, metrics = step(state, frozen, batch, key, grid)
        losses.append(float(waited_for))
        if number > 0:  # the first one was under way before
            seconds.append(time.perf_counter() - start)
    jax.block_until_ready(state)
    if args.trace:
        with jax.profiler.trace(str(args.trace)):
            for _ in range(NUM_TRACED):
                state, _ = step(state, frozen, batch, key, grid)
            jax.block_until_ready(state)
        print(format_kernels(read_kernels(args.trace), num_steps=NUM_TRACED), flush=True)

    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    step_s = statistics.median(seconds)
    flops = (
        count_flops(config, bucket.num_tokens, trains_weights=bool(args.full))
        * num_clips
        * args.accumulate
    )
    peak_gb = stats.get("peak_bytes_in_use", 0) / 1e9
    result = {
        "program": "wan22_jax",
        "bucket": args.bucket,
        "tokens": bucket.num_tokens * num_clips * args.accumulate,
        "batch": args.batch,
        "accumulate": args.accumulate,
        "split": split._asdict(),
        "full": args.full,
        "offload_optimizer": args.offload_optimizer,
        "dtype": args.dtype,
        "activation_checkpointing": args.activation_checkpointing,
        "blocks_to_swap": args.blocks_to_swap,
        "step_s": round(step_s, 4),
        "step_s_all": [round(value, 4) for value in seconds],
        "first_s": round(first_s, 1),
        "cached": is_cached,  # the step was read from --cache
        "peak_gb": round(peak_gb, 2),
        "limit_gb": round(stats.get("bytes_limit", 0) / 1e9, 2),
        "host_gb": round(pinned_bytes(step) / 1e9, 2),
        "model_tflops": round(flops / step_s / 1e12, 1),
        "loss": round(losses[-1], 5),
        "device": device.device_kind,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
    }
    if args.preview:
        velocity = make_velocity(graphdef, state.trainable, frozen, sharding=sharding)
        result["preview"] = make_preview(args, config, velocity, sharding)
    print("RESULT " + json.dumps(result), flush=True)


def make_preview(
    args: argparse.Namespace,
    config: TransformerConfig,
    velocity: Velocity,
    sharding: NamedSharding,
) -> dict[str, Any]:
    """Makes a video of the training weights as a run does; says how much more memory it took."""
    bucket = check_bucket(Bucket(*map(int, args.preview.split("x"))), source="--preview")
    vae_config = TINY_VAE if args.tiny else WAN22_VAE
    vae = nnx.eval_shape(lambda: WanVAE(vae_config, rngs=nnx.Rngs(0)))
    del vae.encoder, vae.conv1
    fill(vae, "bfloat16", on_host=True)
    decoder, on_host = nnx.split(vae)
    del vae
    text_BSE = np.ones((1, config.text_len, config.text_dim), jnp.bfloat16)
    start = time.perf_counter()
    latents_BTYXC = sample_latents(
        velocity,
        text_BSE,
        np.zeros_like(text_BSE),
        shape=(1, *bucket.latent_TYX, config.in_channels),
        solver="unipc",
        steps=3,
        shift=5.0,
        guidance=5.0,
        key=jax.random.key(0),
    )
    latents_BTYXC = np.asarray(latents_BTYXC)
    sampled = jax.local_devices()[0].memory_stats() or {}
    vae = nnx.merge(decoder, jax.device_put(on_host, sharding))
    num_frames = sum(map(len, fetch_video(vae.decode_chunks(latents_BTYXC))))
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "bucket": args.preview,
        "frames": num_frames,
        "s_with_compilation": round(time.perf_counter() - start, 1),
        "peak_gb_sampled": round(sampled.get("peak_bytes_in_use", 0) / 1e9, 2),
        "peak_gb_decoded": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser)
    parser.add_argument("--preview", metavar="WxHxF", help="then make a video of this size, too")
    parser.add_argument("--steps", type=int, default=5, help="timed, after a first one")
    parser.add_argument("--memory_gb", type=float, help="limit of JAX's device allocator, 10^9 B")
    parser.add_argument("--cache", help="persistent compilation cache; left out, none is used")
    parser.add_argument("--trace", type=Path, help="write a profile of two steps here")
    parser.add_argument("--dump", type=Path, help="write the step's HLO here, before and after XLA")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to check the program")
    return parser.parse_args()


def pinned_bytes(step: jax.stages.Compiled) -> int:
    """Host memory that the program reads weights from or offloads activations to."""
    analysis = step.memory_analysis()
    assert analysis is not None
    return analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes


def make_adamw() -> optax.GradientTransformation:
    """The optimizer of the published figures."""
    return make_optimizer(AdamW(), schedule=optax.constant_schedule(1e-4), gradient_clipping=1.0)


def make_batch(
    config: TransformerConfig, bucket: Bucket, batch_size: int, accumulate: int = 1
) -> Batch:
    """White noise in place of latents and text: it takes the same time."""
    rng = np.random.default_rng(0)
    lead = (accumulate, batch_size)
    latents = rng.standard_normal((*lead, *bucket.latent_TYX, config.in_channels), np.float32)
    text = rng.standard_normal((*lead, config.text_len, config.text_dim), np.float32)
    return Batch(latents.astype(jnp.bfloat16), text.astype(jnp.bfloat16))


if __name__ == "__main__":
    main()
