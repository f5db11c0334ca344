"""wan22-sample: how does a prompt, and perhaps a picture, become an mp4 file?

One network is in device memory at a time: text encoder, (VAE for the picture,) transformer, VAE.
"""

import argparse
import gc
import math
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from wan22_jax.adapter import Adapter, attach_adapter, load_adapter
from wan22_jax.data.picture import best_output_size, crop_to_cover, open_picture
from wan22_jax.data.video_file import check_video_path, write_video, written_path
from wan22_jax.errors import BadInput, run_command
from wan22_jax.geometry import Bucket, check_bucket
from wan22_jax.model_folder import (
    choose_transformer_dtype,
    load_text_encoder,
    load_transformer,
    load_vae,
    read_model_card,
    tokenizer_folder,
)
from wan22_jax.sampling import NEGATIVE_PROMPT, sample_latents
from wan22_jax.sharding import claim_gpu, describe_peak_memory, keep_compiled
from wan22_jax.text import encode_text, load_tokenizer, pad_text

Network = TypeVar("Network")

DTYPES = ("bfloat16", "float32")


def main() -> int:
    """Runs the command; returns its exit code."""
    args = parse_arguments(sys.argv[1:])
    claim_gpu()
    keep_compiled()
    return run_command(lambda: sample(args))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the flags; defaults are those of Wan2.2's generate.py for this model."""
    parser = argparse.ArgumentParser(
        prog="wan22-sample",
        description="Makes a video from a prompt (text-to-video) or a prompt and a picture.",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder that wan22-convert wrote")
    add("--prompt", required=True)
    add("--negative_prompt", default="", help="what to avoid; the model's own text if empty")
    add("--image", type=Path, help="the first frame; it also decides the shape of the video")
    add("--lora", type=Path, help="training run, one of its checkpoints, or .safetensors file")
    add("--width", type=int, default=1280, help="in pixels, a multiple of 32")
    add("--height", type=int, default=704, help="with --image only width * height counts")
    add("--frames", type=int, default=121, help="4n + 1, at 24 a second")
    add("--steps", type=int, default=50)
    add("--guidance", type=float, default=5.0, help="1 is off, and twice as fast")
    add("--shift", type=float, default=5.0, help="of the noise levels; 3 suits small videos")
    add("--solver", choices=("unipc", "dpm++"), default="unipc")
    add("--seed", type=int, default=-1, help="-1 draws one")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of transformer and text")
    add("--out", type=Path, default=Path("out.mp4"), help="or .gif, .webp, .png; replaced")
    return parser.parse_args(arguments)


def sample(args: argparse.Namespace) -> None:
    """Makes the video; everything that can be refused is, before the first network is loaded.

    Raises:
        BadInput: a flag is out of range, or a file is missing or not what it should be.
    """
    _check_flags(args)
    card = read_model_card(args.model)
    dtype = choose_transformer_dtype(args.model, card, dtype=args.dtype)
    bucket, frame_BTYX3 = _choose_frame(args)
    adapter = None
    if args.lora is not None:
        adapter = load_adapter(args.lora, base_digest=card.digests["transformer"])
    seed = secrets.randbelow(2**31) if args.seed == -1 else args.seed
    _say(f"{bucket}, {args.steps} steps of {args.solver}, guidance {args.guidance:g}, seed {seed}")

    text_BSE, negative_BSE = _encode_prompts(args)
    first_frame = None if frame_BTYX3 is None else _encode_frame(args.model, frame_BTYX3)
    latents_BTYXC = _denoise(
        args,
        text_BSE,
        negative_BSE,
        dtype=dtype,
        adapter=adapter,
        shape=(1, *bucket.latent_TYX, card.vae.z_dim),
        key=jax.random.key(seed),
        first_frame=first_frame,
    )
    num_frames = write_video(
        args.out,
        _decode(args.model, latents_BTYXC),
        width_px=bucket.width_px,
        height_px=bucket.height_px,
    )
    _say(describe_peak_memory())
    out = written_path(args.out, num_frames=num_frames)
    _say(f"{out}: {num_frames} frames of {bucket.width_px}x{bucket.height_px}")


def quantise_video(video_BTYX3: jax.Array) -> np.ndarray:
    """Clamps decoded video to [-1, 1] and cuts it to bytes, without rounding, as the original."""
    unit_BTYX3 = (jnp.clip(video_BTYX3, -1, 1) + 1) / 2
    return np.asarray((unit_BTYX3 * 255).astype(jnp.uint8))


def _check_flags(args: argparse.Namespace) -> None:
    if not args.prompt.strip():
        raise BadInput("--prompt: a text was expected, it is empty; say what the video shows")
    if args.steps < 1:
        raise BadInput(f"--steps: 1 or more expected, got {args.steps}; 50 is usual")
    if not 0 < args.shift < 1000:
        raise BadInput(f"--shift: a number over 0 expected, got {args.shift:g}; 5 is usual")
    if not math.isfinite(args.guidance):
        raise BadInput(f"--guidance: a number expected, got {args.guidance}; 5 is usual")
    if not -1 <= args.seed < 2**63:
        raise BadInput(f"--seed: 0 or more expected, or -1 to draw one, got {args.seed}")
    check_video_path(args.out, num_frames=args.frames)


def _choose_frame(args: argparse.Namespace) -> tuple[Bucket, np.ndarray | None]:
    """Returns the size of the video and, with a picture, its first frame in pixels."""
    if args.image is None:
        bucket = Bucket(args.width, args.height, args.frames)
        return check_bucket(bucket, source="--width, --height, --frames"), None
    picture = open_picture(args.image)
    width_px, height_px = best_output_size(
        picture.width,
        picture.height,
        area_px=args.width * args.height,
        source=str(args.image),
    )
    bucket = check_bucket(Bucket(width_px, height_px, args.frames), source="--frames")
    return bucket, crop_to_cover(picture, width_px=width_px, height_px=height_px)


def _encode_prompts(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = load_tokenizer(tokenizer_folder(args.model))
    encoder = _load_alone(load_text_encoder, args.model, dtype=args.dtype)
    prompts = [args.prompt, args.negative_prompt or NEGATIVE_PROMPT]
    text_BSE, negative_BSE = (
        pad_text([text_SE]) for text_SE in encode_text(encoder, tokenizer, prompts)
    )
    return text_BSE, negative_BSE


def _encode_frame(model: Path, frame_BTYX3: np.ndarray) -> jax.Array:
    return next(_load_alone(load_vae, model).encode_chunks([jnp.asarray(frame_BTYX3)]))


def _denoise(
    args: argparse.Namespace,
    text_BSE: np.ndarray,
    negative_BSE: np.ndarray,
    *,
    dtype: str,
    adapter: Adapter | None,
    shape: tuple[int, int, int, int, int],
    key: jax.Array,
    first_frame: jax.Array | None,
) -> jax.Array:
    transformer = _load_alone(load_transformer, args.model, dtype=dtype)
    if adapter is not None:
        attach_adapter(transformer, adapter)
    return sample_latents(
        transformer,
        text_BSE,
        negative_BSE,
        shape=shape,
        solver=args.solver,
        steps=args.steps,
        shift=args.shift,
        guidance=args.guidance,
        key=key,
        first_frame=first_frame,
        progress=True,
    )


def _decode(model: Path, latents_BTYXC: jax.Array) -> Iterator[np.ndarray]:
    for video_BTYX3 in _load_alone(load_vae, model).decode_chunks(latents_BTYXC):
        yield quantise_video(video_BTYX3)[0]


def _load_alone(load: Callable[..., Network], model: Path, **options: object) -> Network:
    gc.collect()  # NNX modules are cyclic: the network before would keep its device memory
    return load(model, **options)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
