"""wan22-sample: how do prompts, and perhaps pictures, become video files?

One network is in device memory at a time: text encoder, (VAE for the pictures,) transformer, VAE.
Each makes its part of all videos before the next one is loaded.
"""

import argparse
import gc
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from wan22_jax.adapter import Adapter, attach_adapter, check_fit, load_adapter
from wan22_jax.adapter_join import join_loras, parse_lora
from wan22_jax.data.video_file import check_video_path, write_video, written_path
from wan22_jax.errors import BadInput, run_command
from wan22_jax.model.vae_tiles import decode_tiles
from wan22_jax.model_folder import (
    FLOAT8,
    ModelCard,
    abstract_transformer,
    choose_transformer_dtype,
    load_transformer,
    load_vae,
    read_model_card,
    unquantised_dtype,
)
from wan22_jax.prompts import Request, check_request, choose_frame, read_prompt, read_prompt_file
from wan22_jax.sharding import (
    Split,
    choose_devices,
    claim_gpu,
    describe_peak_memory,
    device_memory,
    keep_compiled,
    make_mesh,
    replicated,
)
from wan22_jax.velocity import choose_blocks_to_swap, place_velocity
from wan22_jax.videos import (
    Video,
    denoise,
    describe_request,
    encode_frame,
    encode_texts,
    fetch_video,
)

Network = TypeVar("Network")

DTYPES = ("bfloat16", FLOAT8, "float32")
VAE_DTYPES = ("bfloat16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    claim_gpu()
    keep_compiled()
    return run_command(lambda: sample(args))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the flags; defaults are those of Wan2.2's generate.py for this model."""
    parser = argparse.ArgumentParser(
        prog="wan22-sample",
        allow_abbrev=False,
        description="Makes videos from prompts (text-to-video), or from prompts and pictures.",
        epilog="A prompt may end in switches of its own, which win over the flags: "
        "'a cat --w 832 --h 480 --f 81 --d 7 --s 30 --g 4 --fs 3 --n blurry --i cat.png'.",
    )
    add, default = parser.add_argument, Request()
    add("--model", type=Path, required=True, help="model folder that wan22-convert wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", nargs="+", help="a video for each")
    what.add_argument("--prompts", type=Path, help="text file with a prompt a line, # for remarks")
    add("--negative_prompt", "--n", default="", help="what to avoid; the model's own text if empty")
    add("--image", "--i", type=Path, help="the first frame; it also decides the video's shape")
    add("--width", "--w", type=int, default=default.width, help="in pixels, a multiple of 32")
    add("--height", "--h", type=int, default=default.height, help="with --image the area counts")
    add("--frames", "--f", type=int, default=default.frames, help="4n + 1, at 24 a second")
    add("--steps", "--s", type=int, default=default.steps)
    add("--guidance", "--g", type=float, default=default.guidance, help="1 is off: twice as fast")
    add("--shift", "--fs", type=float, default=default.shift, help="3 suits small videos")
    add("--solver", choices=("unipc", "dpm++"), default=default.solver)
    seed = "-1 draws one; several make as many videos of each prompt"
    add("--seed", "--d", type=int, nargs="+", default=[default.seed], help=seed)
    lora = "training run, one of its checkpoints, or .safetensors file; several are added up"
    add("--lora", nargs="+", default=[], metavar="FILE[:STRENGTH]", help=lora)
    add("--dtype", choices=DTYPES, default="bfloat16", help="of transformer and text encoder")
    add("--vae_dtype", choices=VAE_DTYPES, default="bfloat16", help="float32 is the original's")
    tile = "decode in tiles of so many pixels: approximate, for small cards"
    add("--vae_tile", type=int, metavar="PX", help=tile)
    devices = "so many GPUs share each video; all of them if it is left out"
    add("--devices", type=int, metavar="N", help=devices)
    swap = "so many blocks stay in host memory; as many as have to if it is left out"
    add("--blocks_to_swap", type=int, help=swap)
    out = "mp4, gif, webp or png (a folder of frames); replaced if it exists"
    add("--out", type=Path, default=Path("out.mp4"), help=out)
    return parser.parse_args(arguments)


def sample(args: argparse.Namespace) -> None:
    """Makes the videos; everything that can be refused is, before the first network is loaded.

    Raises:
        BadInput: a flag is out of range, or a file is missing or not what it should be.
    """
    devices = choose_devices(args.devices)
    videos = plan_videos(args)
    card = read_model_card(args.model)
    dtype = choose_transformer_dtype(args.model, card, dtype=args.dtype)
    adapter = _read_adapter(args.lora, card)

    texts = encode_texts(videos, args.model, dtype=unquantised_dtype(args.dtype))
    frames: list[np.ndarray | None] = [None] * len(videos)
    if any(video.frame_BTYX3 is not None for video in videos):
        vae = _load_alone(load_vae, args.model, dtype=args.vae_dtype)
        frames = [encode_frame(vae, video) for video in videos]
        del vae
    latents = _denoise(
        args, card, videos, texts, frames, devices=devices, dtype=dtype, adapter=adapter
    )
    settings = {"model": card.digest, "dtype": dtype, "vae_dtype": args.vae_dtype}
    settings |= {"lora": args.lora} if args.lora else {}
    settings |= {} if args.vae_tile is None else {"vae_tile": args.vae_tile}
    _decode(args, videos, latents, settings)
    _say(describe_peak_memory())


def plan_videos(args: argparse.Namespace) -> list[Video]:
    """Says which videos the flags ask for; seeds are drawn here.

    Raises:
        BadInput: what is asked for cannot be made, or not be written.
    """
    names = {each.name for each in fields(Request)} - {"prompt", "negative", "seed"}
    shared = Request(
        "-",
        negative=args.negative_prompt,
        **{name: getattr(args, name) for name in names},
    )
    check_request(shared, source="--")
    if args.blocks_to_swap is not None and args.blocks_to_swap < 0:
        raise BadInput(f"--blocks_to_swap: 0 or more expected, got {args.blocks_to_swap}")
    if args.vae_tile is not None and (args.vae_tile < 64 or args.vae_tile % 16):
        raise BadInput(f"--vae_tile: a multiple of 16 from 64 expected, got {args.vae_tile}")
    if args.prompts is not None:
        asked = read_prompt_file(args.prompts, shared)
    else:
        asked = [read_prompt(text, shared, source="--prompt") for text in args.prompt]
    requests = [
        check_request(replace(request, seed=_draw_seed(seed)), source="--")
        for request in asked
        for seed in (args.seed if request.seed == -1 else [request.seed])
    ]
    videos = []
    for number, request in enumerate(requests):
        name = f"{args.out.stem}_{number:02d}_seed{request.seed}{args.out.suffix}"
        path = args.out if len(requests) == 1 else args.out.with_name(name)
        source = "--width, --height, --frames" if len(requests) == 1 else request.prompt[:60]
        bucket, frame_BTYX3 = choose_frame(request, source=source)
        check_video_path(path, num_frames=bucket.frames)
        videos.append(Video(request, path, bucket, frame_BTYX3))
    return videos


def choose_split(videos: Sequence[Video], *, num_heads: int, num_devices: int) -> Split:
    """Divides the passes of guidance among two halves of the devices, and tokens among each half.

    Tokens only, where a video has no guidance or the devices have no halves.
    """
    halves = 2 if num_devices % 2 == 0 and all(video.negative for video in videos) else 1
    rest = num_devices // halves
    return Split(data=halves, context=max(n for n in range(1, rest + 1) if num_heads % n == 0))


def _draw_seed(seed: int) -> int:
    return secrets.randbelow(2**31) if seed == -1 else seed


def _read_adapter(words: Sequence[str], card: ModelCard) -> Adapter | None:
    """Reads the LoRAs, checks that they fit the model and adds them up."""
    model = abstract_transformer(card.transformer, float8=False)
    linears = {name.removeprefix("blocks."): layer for name, layer in model.lora_targets()}
    loras = []
    for word in words:
        path, strength = parse_lora(word)
        adapter = load_adapter(path, base_digest=card.digests["transformer"])
        check_fit(adapter, {name: layer.weight.shape for name, layer in linears.items()})
        loras.append((adapter, strength))
    if not loras:
        return None
    if len(loras) == 1 and loras[0][1] == 1:
        return loras[0][0]
    return join_loras(loras, source=" and ".join(words))


def _denoise(
    args: argparse.Namespace,
    card: ModelCard,
    videos: Sequence[Video],
    texts: Mapping[str, np.ndarray],
    frames: Sequence[np.ndarray | None],
    *,
    devices: Sequence[Any],
    dtype: str,
    adapter: Adapter | None,
) -> list[np.ndarray]:
    """Returns the clean latents of each video, on the host."""
    split = choose_split(videos, num_heads=card.transformer.num_heads, num_devices=len(devices))
    most = max(-(-video.bucket.num_tokens // split.context) for video in videos)
    swap = args.blocks_to_swap
    if swap is None:
        swap = choose_blocks_to_swap(
            card.transformer, dtype=dtype, num_tokens=most, memory_bytes=device_memory()
        )
    model = _load_alone(load_transformer, args.model, dtype=dtype, host=True)
    if adapter is not None:
        attach_adapter(model, adapter)
    if swap:
        _say(f"{min(swap, card.transformer.num_layers)} blocks wait in host memory")
    mesh = make_mesh(split, devices)
    if split.num_devices > 1:
        halves = ", half of them for each pass of guidance" if split.data > 1 else ""
        _say(f"{split.num_devices} of {len(jax.local_devices())} devices share each video{halves}")
    velocity = place_velocity(model, blocks_to_swap=swap, sharding=replicated(mesh))
    del model
    latents = []
    steps = sum(video.request.steps for video in videos)
    with tqdm(total=steps, desc="denoise", unit="step", dynamic_ncols=True) as bar:
        for video, first_frame in zip(videos, frames, strict=True):
            tqdm.write(f"{video.path}: {video.bucket}, {video.request}", file=sys.stdout)
            latents.append(
                denoise(
                    *(velocity, video, texts, first_frame),
                    channels=card.vae.z_dim,
                    on_step=bar.update,
                    paired=split.data > 1,
                )
            )
    return latents


def _decode(
    args: argparse.Namespace,
    videos: Sequence[Video],
    latents: Iterable[np.ndarray],
    settings: Mapping[str, object],
) -> None:
    vae = _load_alone(load_vae, args.model, dtype=args.vae_dtype)
    for video, latents_BTYXC in zip(videos, latents, strict=True):
        bucket = video.bucket
        decode: Callable[[np.ndarray], Iterable] = vae.decode_chunks
        if args.vae_tile is not None:
            decode = partial(decode_tiles, decode, tile_px=args.vae_tile)
        chunks = fetch_video(decode(latents_BTYXC))
        num_frames = write_video(
            video.path,
            _show_progress(chunks, total=len(latents_BTYXC[0])),
            width_px=bucket.width_px,
            height_px=bucket.height_px,
            metadata={**describe_request(video), **settings},
        )
        written = written_path(video.path, num_frames=num_frames)
        _say(f"{written}: {num_frames} frames of {bucket.width_px}x{bucket.height_px}")


def _show_progress(chunks: Iterable[np.ndarray], *, total: int) -> Iterator[np.ndarray]:
    with tqdm(total=total, desc="decode", unit="latent frame", dynamic_ncols=True) as bar:
        for chunk in chunks:
            yield chunk
            bar.update()


def _load_alone(load: Callable[..., Network], model: Path, **options: object) -> Network:
    gc.collect()  # NNX modules are cyclic: the network before would keep its device memory
    return load(model, **options)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
