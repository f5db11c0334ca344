"""How long do a guided denoising step and the VAE's decoding take, and how much memory?

One part a process, at the checkpoint's sizes with random weights; as wan22-sample runs them, but
for reading weights. Prints one line of JSON after the word RESULT. Needs the package installed or
the repository's root on PYTHONPATH.

    python benchmarks/sample.py step --dtype float8            # seconds a guided step, peak GB
    python benchmarks/sample.py step --memory_gb 12            # blocks in host memory as needed
    python benchmarks/sample.py step --trace profile           # and where the time goes
    python benchmarks/sample.py step --context 2               # two GPUs for one video
    python benchmarks/sample.py decode                         # seconds a clip, peak GB
    python benchmarks/sample.py clip --dtype float8            # 50 steps and decoding together
    python benchmarks/sample.py step --tiny --bucket 64x64x5   # does it run, on a CPU
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from encode import fill, time_calls
from flax import nnx
from kernel_table import format_kernels, read_kernels
from random_model import TINY, add_lora, limit_memory, make_model

from wan22_jax.demo_checkpoint import TINY_VAE
from wan22_jax.geometry import Bucket, check_bucket
from wan22_jax.model.transformer import TI2V_5B
from wan22_jax.model.vae import WAN22_VAE, WanVAE
from wan22_jax.sampling import sample_latents
from wan22_jax.sharding import Split, claim_gpu, device_memory, make_mesh, replicated
from wan22_jax.velocity import choose_blocks_to_swap, place_velocity
from wan22_jax.videos import fetch_video


def main() -> None:
    args = parse_arguments()
    limit_memory(None if args.tiny else args.memory_gb)
    claim_gpu()
    bucket = check_bucket(Bucket(*map(int, args.bucket.split("x"))), source="--bucket")
    parts = {"step": time_steps, "decode": time_decoding, "clip": time_clip}
    timed = parts[args.part](args, bucket)
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    result = {
        "program": "wan22_jax",
        "part": args.part,
        "bucket": args.bucket,
        "dtype": args.dtype,
        "split": [args.data, 1, args.context],
        **timed,
        "peak_gb": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2),
        "limit_gb": round(stats.get("bytes_limit", 0) / 1e9, 2),
        "device": device.device_kind,
        "jax": jax.__version__,
    }
    print("RESULT " + json.dumps(result), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("step", "decode", "clip"))
    parser.add_argument("--bucket", default="1280x704x121", help="width x height x frames")
    parser.add_argument("--dtype", choices=("bfloat16", "float8", "float32"), default="bfloat16")
    parser.add_argument("--guidance", type=float, default=5.0, help="1: one model call a step")
    parser.add_argument("--data", type=int, default=1, help="2: GPUs for each pass of guidance")
    parser.add_argument("--context", type=int, default=1, help="GPUs that share a video's tokens")
    parser.add_argument("--lora", action="store_true", help="with an adapter of rank 32")
    parser.add_argument("--steps", type=int, default=50, help="of a clip")
    parser.add_argument("--repeats", type=int, default=5, help="timed, after a first one")
    parser.add_argument("--memory_gb", type=float, help="limit of JAX's device allocator, 10^9 B")
    parser.add_argument("--trace", type=Path, help="folder for a profile of one more step")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check the program")
    return parser.parse_args()


def prepare_sampler(args: argparse.Namespace, bucket: Bucket) -> tuple[Callable, int]:
    """Makes ``sample(steps, on_step) -> latents`` and says how many blocks wait on the host."""
    config = TINY if args.tiny else TI2V_5B
    swap = choose_blocks_to_swap(
        config, dtype=args.dtype, num_tokens=bucket.num_tokens, memory_bytes=device_memory()
    )
    # Drawn on the device, weights would leave it in pieces too small for what a step needs.
    model = make_model(config, dtype=args.dtype, on_host=args.memory_gb is not None)
    if args.lora:
        add_lora(model, seed=2, std_b=0.03)
    mesh = make_mesh(Split(args.data, 1, args.context))
    velocity = place_velocity(model, blocks_to_swap=swap, sharding=replicated(mesh))
    del model
    keys = jax.random.split(jax.random.key(1), 2)
    shape = (1, config.text_len, config.text_dim)
    text_BSE, negative_BSE = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)

    def sample(steps: int, on_step: Callable[..., None] | None = None) -> jax.Array:
        return sample_latents(
            velocity,
            text_BSE,
            negative_BSE,
            shape=(1, *bucket.latent_TYX, config.in_channels),
            solver="unipc",
            steps=steps,
            shift=5.0,
            guidance=args.guidance,
            key=jax.random.key(0),
            on_step=on_step,
            paired=args.data > 1,
        )

    return sample, swap


def time_steps(args: argparse.Namespace, bucket: Bucket) -> dict[str, Any]:
    """Times the steps of one run of the sampler; the first compiles."""
    sample, swap = prepare_sampler(args, bucket)
    ends = [time.perf_counter()]

    def run(steps: int) -> None:
        latents_BTYXC = sample(steps, lambda *_: ends.append(time.perf_counter()))
        assert np.isfinite(np.asarray(latents_BTYXC)).all()

    run(args.repeats + 2)
    first_s, _, *seconds = np.diff(ends)
    if args.trace:
        with jax.profiler.trace(str(args.trace)):
            run(1)
        print(format_kernels(read_kernels(args.trace), num_steps=1), flush=True)
    return {
        "guidance": args.guidance,
        "lora": args.lora,
        "blocks_to_swap": swap,
        "s": round(statistics.median(seconds), 4),
        "s_all": [round(value, 4) for value in seconds],
        "first_s": round(first_s, 1),
    }


def time_decoding(args: argparse.Namespace, bucket: Bucket) -> dict[str, Any]:
    """Times a clip from latents to bytes in host memory, chunk by chunk."""
    decode = prepare_decoder(args, bucket)
    shape = (1, *bucket.latent_TYX, WAN22_VAE.z_dim)
    latents_BTYXC = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    return time_calls(lambda: decode(latents_BTYXC), args.repeats)


def time_clip(args: argparse.Namespace, bucket: Bucket) -> dict[str, Any]:
    """Times a clip from text embeddings to bytes in host memory, its programs compiled before.

    The decoder is made when the transformer's weights are still there, as in wan22-sample.
    """
    sample, swap = prepare_sampler(args, bucket)
    decode = prepare_decoder(args, bucket)
    decode(sample(2))
    start = time.perf_counter()
    latents_BTYXC = jax.block_until_ready(sample(args.steps))
    sampled = time.perf_counter()
    decode(latents_BTYXC)
    end = time.perf_counter()
    return {
        "steps": args.steps,
        "guidance": args.guidance,
        "lora": args.lora,
        "blocks_to_swap": swap,
        "s": round(end - start, 2),
        "sampling_s": round(sampled - start, 2),
        "decoding_s": round(end - sampled, 2),
    }


def prepare_decoder(args: argparse.Namespace, bucket: Bucket) -> Callable[[jax.Array], None]:
    """Makes what decodes latents and fetches the video, chunk by chunk."""
    config = TINY_VAE if args.tiny else WAN22_VAE
    vae = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    del vae.encoder
    fill(vae, "float32" if args.dtype == "float32" else "bfloat16", on_host=False)

    def decode(latents_BTYXC: jax.Array) -> None:
        frames = sum(
            len(video_TYX3) for video_TYX3 in fetch_video(vae.decode_chunks(latents_BTYXC))
        )
        assert frames == bucket.frames

    return decode


if __name__ == "__main__":
    main()
