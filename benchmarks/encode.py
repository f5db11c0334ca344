"""How long do the VAE and the text encoder take to cache a data set, and how much memory?

The folder runs on all local devices, or on the first ``--devices``; the other parts on the first.

One part a process, at the checkpoint's sizes with random weights. Prints one line of JSON after the
word RESULT. Needs the package installed or the repository's root on PYTHONPATH.

    python benchmarks/encode.py vae --bucket 1280x704x121                 # seconds a clip, peak GB
    python benchmarks/encode.py vae --bucket 832x480x81 --dtype float32
    python benchmarks/encode.py text                                      # 8 prompts of 512 tokens
    python benchmarks/encode.py text --stream --memory_gb 10
    python benchmarks/encode.py folder --bucket 1280x704x121 --clips 12   # against the VAE alone
    python benchmarks/encode.py folder --clips 96 --devices 8             # 12 clips a GPU
    python benchmarks/encode.py vae --tiny --bucket 32x32x5               # does it run, on a CPU
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from random_model import limit_memory

from wan22_jax.clip_encoder import (
    count_frame_bytes,
    decode_ahead,
    encode_clips,
    fetch_latents,
    start_encoding,
)
from wan22_jax.data.video import MediaInfo, probe, read_clip
from wan22_jax.demo_checkpoint import TINY_TEXT_ENCODER, TINY_VAE
from wan22_jax.geometry import Bucket, check_bucket
from wan22_jax.model.umt5 import UMT5, UMT5_XXL
from wan22_jax.model.umt5_streamed import StreamedUMT5
from wan22_jax.model.vae import WAN22_VAE, WanVAE
from wan22_jax.sharding import choose_devices, claim_gpu, copy_to_each
from wan22_jax.text import TEXT_LEN, run_encoder
from wan22_jax.weights import set_parameters, stacked_shapes

FPS = 24


def main() -> None:
    args = parse_arguments()
    limit_memory(None if args.tiny else args.memory_gb)
    claim_gpu()
    bucket = check_bucket(Bucket(*map(int, args.bucket.split("x"))), source="--bucket")
    if args.part == "text":
        result = time_text(args)
    elif args.part == "vae":
        result = {"bucket": args.bucket, "dtype": args.dtype, **time_vae(args, bucket)}
    else:
        result = {"bucket": args.bucket, "dtype": args.dtype, **time_folder(args, bucket)}
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    result |= {
        "peak_gb": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2),
        "limit_gb": round(stats.get("bytes_limit", 0) / 1e9, 2),
        "device": device.device_kind,
        "jax": jax.__version__,
    }
    print("RESULT " + json.dumps({"program": "wan22_jax", "part": args.part} | result), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("vae", "text", "folder"))
    parser.add_argument("--bucket", default="1280x704x121", help="width x height x frames")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--stream", action="store_true", help="layers of the text encoder on host")
    parser.add_argument("--clips", type=int, default=12, help="of the folder")
    parser.add_argument("--devices", type=int, help="of the folder; all unless given")
    parser.add_argument("--repeats", type=int, default=5, help="timed, after a first one")
    parser.add_argument("--memory_gb", type=float, help="limit of JAX's device allocator, 10^9 B")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check the program")
    args = parser.parse_args()
    if args.devices is not None and args.part != "folder":
        parser.error("--devices is of the folder; the other parts run on the first device")
    return args


def time_vae(args: argparse.Namespace, bucket: Bucket) -> dict[str, Any]:
    """Times clips that are in host memory, latents fetched; one at a time."""
    vae = make_vae(args)
    pixels_TYX3 = draw_pixels(bucket)
    return time_calls(lambda: fetch_latents(start_encoding(vae, pixels_TYX3)), args.repeats)


def time_text(args: argparse.Namespace) -> dict[str, Any]:
    """Times prompts of full length, embeddings fetched."""
    config = TINY_TEXT_ENCODER if args.tiny else UMT5_XXL
    encoder: UMT5 | StreamedUMT5 = nnx.eval_shape(lambda: UMT5(config, rngs=nnx.Rngs(0)))
    fill(encoder, jnp.bfloat16, on_host=args.stream)
    if args.stream:
        encoder = StreamedUMT5(encoder)
    shape = (args.prompts, TEXT_LEN)
    tokens_BS = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    mask_BS = np.ones(shape, bool)
    timed = time_calls(lambda: run_encoder(encoder, tokens_BS, mask_BS), args.repeats)
    return {"prompts": args.prompts, "streamed": args.stream, **timed}


def time_folder(args: argparse.Namespace, bucket: Bucket) -> dict[str, Any]:
    """Times clips from files to latents against as many clips from host memory, both overlapped."""
    with tempfile.TemporaryDirectory() as folder:
        # As wan22-cache does, but empty: the first device compiles, the others read its program.
        jax.config.update("jax_compilation_cache_dir", str(Path(folder, "compiled")))
        vaes = copy_to_each(make_vae(args), choose_devices(args.devices))
        pixels_TYX3 = draw_pixels(bucket)
        first_s = [
            measure(lambda vae=vae: fetch_latents(start_encoding(vae, pixels_TYX3))) for vae in vaes
        ]
        ready = ((number, pixels_TYX3) for number in range(args.clips))
        vae_s = measure(lambda: list(encode_clips(vaes, ready)))
        paths = [Path(folder, f"{number}.mp4") for number in range(args.clips)]
        for path in paths:
            write_clip(path, bucket)
        found = [(path, probe(path)) for path in paths]

        def decode(clip: tuple[Path, MediaInfo]) -> np.ndarray:
            return read_clip(*clip, bucket)

        def run() -> None:
            size = count_frame_bytes(bucket)
            decoded = decode_ahead(found, decode, count_bytes=lambda _: size, num_devices=len(vaes))
            for _ in encode_clips(vaes, decoded):
                pass

        folder_s = measure(run)
    return {
        "clips": args.clips,
        "devices": len(vaes),
        "first_s": [round(seconds, 1) for seconds in first_s],
        "vae_s_per_clip": round(vae_s / args.clips, 4),
        "folder_s_per_clip": round(folder_s / args.clips, 4),
        "folder_over_vae": round(folder_s / vae_s, 3),
        "folder_clips_per_s": round(args.clips / folder_s, 3),
    }


def make_vae(args: argparse.Namespace) -> WanVAE:
    """Draws a VAE and drops its decoder, as wan22-cache does."""
    config = TINY_VAE if args.tiny else WAN22_VAE
    vae = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    del vae.decoder
    fill(vae, args.dtype, on_host=False)
    return vae


def fill(module: nnx.Module, dtype: Any, *, on_host: bool) -> None:
    """Draws every parameter, one at a time."""
    place: Callable = np.asarray if on_host else lambda array: array
    arrays = {
        name: place(_draw(jax.random.key(number), shape=shape, dtype=jnp.dtype(dtype)))
        for number, (name, shape) in enumerate(stacked_shapes(module).items())
    }
    set_parameters(module, arrays)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(key: jax.Array, *, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def draw_pixels(bucket: Bucket) -> np.ndarray:
    shape = (bucket.frames, bucket.height_px, bucket.width_px, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_clip(path: Path, bucket: Bucket) -> None:
    """Writes a clip of the bucket's size that H.264 does not find trivial: a moving gradient."""
    rows = np.arange(bucket.height_px)[:, None, None]
    columns = np.arange(bucket.width_px)[None, :, None]
    colours = np.array([1, 2, 3])
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = bucket.width_px, bucket.height_px, "yuv420p"
        for number in range(bucket.frames):
            pixels = (rows * colours + columns + 5 * number) % 256
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def time_calls(run: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Seconds of the first call, which compiles, and of the others."""
    first_s = measure(run)
    seconds = [measure(run) for _ in range(repeats)]
    return {
        "s": round(statistics.median(seconds), 4),
        "s_all": [round(value, 4) for value in seconds],
        "first_s": round(first_s, 1),
    }


def measure(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
