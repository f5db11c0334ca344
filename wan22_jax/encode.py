"""``wan22-cache``: encodes the clips and captions of a data set, once, before training.

Reads every file and reports every problem first. Then the text encoder runs and is freed, then the
VAE; only what is not in the cache yet is encoded, and what is done survives a killed run. All GPUs
of this machine work, each on clips of its own.
"""

import argparse
import gc
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from wan22_jax.clip_encoder import count_frame_bytes, decode_ahead, encode_clips
from wan22_jax.config import ClipMode, TrainConfig, load_config, load_dataset
from wan22_jax.data.cache import (
    make_latents_key,
    make_mask_key,
    make_text_key,
    name_encoders,
)
from wan22_jax.data.cache_writer import ALONE, SHARD_BYTES, CacheWriter, Process, open_writer
from wan22_jax.data.companions import read_mask
from wan22_jax.data.index import ClipEntry
from wan22_jax.data.preflight import Epoch, choose_exit_code, report_dataset
from wan22_jax.data.probed import check_stamp
from wan22_jax.data.survey import SourceClip, survey_folder, take_clips
from wan22_jax.data.upkeep import collect_garbage, describe_found, verify_cache
from wan22_jax.data.video import read_clip
from wan22_jax.dataset import (
    Directory,
    choose_uncond_fraction,
    open_caches,
    read_datasets,
    read_directories,
)
from wan22_jax.errors import BadInput, one_line, run_command
from wan22_jax.examples import describe_step, open_loader, open_training_caches
from wan22_jax.model.umt5 import UMT5
from wan22_jax.model_folder import (
    load_fitting_text_encoder,
    load_vae,
    read_model_card,
    tokenizer_folder,
)
from wan22_jax.sharding import (
    choose_devices,
    claim_gpu,
    copy_to_each,
    describe_peak_memory,
    device_memory,
    keep_compiled,
)
from wan22_jax.text import TEXT_LEN, encode_each, is_cut, load_tokenizer

CAPTIONS_AT_ONCE = 8
BATCHES_A_DEVICE = 16  # 1.4 s of an H100: fewer do not pay for copying the text encoder, 11 GB
MAX_PROCESSES = 10_000  # their numbers have four digits in file names
MAX_STEP = 2**31 - 1  # training counts in int32


class Work(NamedTuple):
    """One directory: its clips and the cache that they go to."""

    directory: Directory
    clips: list[SourceClip]
    cache: CacheWriter


MissingText = tuple[str, CacheWriter]
Missing = tuple[SourceClip, CacheWriter]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="wan22-cache", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the training TOML file")
    parser.add_argument(
        "--regenerate_cache", action="store_true", help="encode everything again from scratch"
    )
    parser.add_argument(
        "--allow-drop",
        action="store_true",
        help="leave out clips that no bucket takes instead of stopping",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be cached and trained and what not, and write that as JSON and as an "
        "HTML page into output_dir; exit code 1 if clips would be lost, 2 if files are broken",
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="encode on the first N GPUs; all unless given"
    )
    _add_process_flags(parser)
    _add_upkeep_flags(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override config keys")
    arguments, exit_code = parser.parse_args(argv), 0

    def run() -> None:
        nonlocal exit_code
        exit_code = _run(arguments)

    return run_command(run) or exit_code


def encode_dataset(
    dataset_file: Path,
    model: Path,
    *,
    eval_files: Sequence[Path] = (),
    vae_dtype: str = "bfloat16",
    regenerate: bool = False,
    clip_mode: ClipMode = "single_beginning",
    uncond_fraction: float | int = 0,
    allow_drop: bool = False,
    process: Process = ALONE,
    collect: bool = False,
    num_devices: int | None = None,
) -> None:
    """Brings the caches of dataset files up to date with their folders.

    Args:
        dataset_file: the dataset TOML.
        model: a model folder that wan22-convert wrote.
        eval_files: the dataset TOMLs of evaluation.
        vae_dtype: what the VAE computes in, "bfloat16" or "float32".
        regenerate: encode everything, whatever is cached.
        clip_mode: ``video_clip_mode`` of the main file.
        uncond_fraction: of the main file; above 0, the empty caption is encoded too.
        allow_drop: leave out files that no bucket takes.
        process: which part of the work is this process's.
        collect: drop the records that no clip needs, in the end.
        num_devices: of this process that encode, all if None; the records are the same.

    Raises:
        BadInput: a file of the data set cannot be used, a cache has other encoders, or there are
            fewer devices.
    """
    claim_gpu()
    keep_compiled()
    if num_devices is not None:
        choose_devices(num_devices)  # refuses before a cache is dropped
    directories = read_datasets([dataset_file, *eval_files], clip_mode=clip_mode)
    uncond_fraction = choose_uncond_fraction(dataset_file, in_main_file=uncond_fraction)
    more_captions = [""] if uncond_fraction else []
    encoders = name_encoders(read_model_card(model).digests, vae_dtype=vae_dtype)
    surveys = [
        take_clips(
            directory.path,
            survey_folder(directory.folder, warn=_warn),
            allow_drop=allow_drop,
            warn=_warn,
        )
        for directory in directories
    ]
    with ExitStack() as stack:
        jobs = []
        for directory, clips in zip(directories, surveys, strict=True):
            writer = open_writer(
                directory.cache_folder, encoders=encoders, regenerate=regenerate, process=process
            )
            jobs.append(Work(directory, clips, stack.enter_context(writer)))
        for work in jobs:
            _check_space(work)
        captions, clips = _list_missing_captions(jobs, more_captions), _list_missing(jobs)
        if captions or clips:
            devices = choose_devices(num_devices)
            _print(_describe_devices(devices))
            _encode_captions(captions, model, devices)
            gc.collect()  # the text encoder's arrays go before the VAE's come
            _encode_clips(clips, model, vae_dtype, devices)
        for work in jobs:
            _add_masks(work)
            entries = [_make_entry(clip) for clip in work.clips]
            left = work.cache.finish(
                entries,
                buckets=work.directory.rule.buckets,
                options=work.directory.folder.options,
            )
            if left:
                _warn(_describe_rest(work, left))
            elif collect:
                dropped = collect_garbage(work.cache.folder)
                sys.stdout.write(f"{work.cache.folder}: {dropped} unused records dropped\n")
    sys.stdout.write(f"{_describe(jobs)}{describe_peak_memory()}\n")


def verify_dataset(config: TrainConfig) -> None:
    """Reads every record of the data sets' caches; prints a line of counts for each.

    Raises:
        BadInput: a cache is incomplete, or records of it are damaged; names the first of them.
    """
    card = read_model_card(Path(config.model.ckpt_path))
    encoders = name_encoders(card.digests, vae_dtype=config.model.vae_dtype)
    for file in [Path(config.dataset), *config.eval_sets.values()]:
        caches = open_caches(file, encoders=encoders, clip_mode=config.video_clip_mode)
        for cache, _ in caches:
            sys.stdout.write(f"{describe_found(cache, verify_cache(cache))}\n")


def show_batch(config: TrainConfig, step: int) -> None:
    """Prints the clips, captions, noise levels and tasks of a step, counted from 1.

    Raises:
        BadInput: there is no such step, or ``open_loader`` finds something wrong.
    """
    if not 1 <= step <= MAX_STEP:
        raise BadInput(f"--show-batch {step}: steps count from 1 and end at {MAX_STEP}")
    jax.config.update("jax_platforms", "cpu")  # a GPU may be training meanwhile; draws are the same
    card = read_model_card(Path(config.model.ckpt_path))
    loader = open_loader(config, open_training_caches(config, card))
    for line in describe_step(config, loader, step - 1):
        _print(line)


def _run(arguments: argparse.Namespace) -> int:
    _check_modes(arguments)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        return choose_exit_code(_report(config), allow_drop=arguments.allow_drop)
    if arguments.verify:
        verify_dataset(config)
        return 0
    if arguments.show_batch is not None:
        show_batch(config, arguments.show_batch)
        return 0
    encode_dataset(
        Path(config.dataset),
        Path(config.model.ckpt_path),
        eval_files=list(config.eval_sets.values()),
        vae_dtype=config.model.vae_dtype,
        regenerate=arguments.regenerate_cache,
        clip_mode=config.video_clip_mode,
        uncond_fraction=config.uncond_fraction,
        allow_drop=arguments.allow_drop,
        process=_read_process(arguments),
        collect=arguments.gc,
        num_devices=arguments.devices,
    )
    return 0


def _check_modes(arguments: argparse.Namespace) -> None:
    asked = {
        "--dry-run": arguments.dry_run,
        "--verify": arguments.verify,
        "--show-batch": arguments.show_batch is not None,
        "--gc": arguments.gc,
        "--regenerate_cache": arguments.regenerate_cache,
    }
    given = [flag for flag, is_given in asked.items() if is_given]
    if len(given) > 1 and given != ["--gc", "--regenerate_cache"]:
        raise BadInput(f"{' and '.join(given)}: give one of them; {given[0]} does nothing else")


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--process_count",
        type=int,
        default=1,
        metavar="N",
        help="share the work among N processes, on any hosts that see the clips",
    )
    parser.add_argument(
        "--process_index", type=int, default=0, metavar="I", help="this is process I of 0 .. N-1"
    )


def _add_upkeep_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache_only", action="store_true", help="what this command does anyway (diffusion-pipe)"
    )
    parser.add_argument(
        "--gc",
        action="store_true",
        help="drop cached records that this data set does not need (any more), in the end",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every cached record and do nothing else"
    )
    parser.add_argument(
        "--show-batch",
        type=int,
        metavar="N",
        help="print what step N of a training with this config trains on and do nothing else; "
        "steps count from 1, as in logs",
    )


def _read_process(arguments: argparse.Namespace) -> Process:
    if arguments.gc and arguments.process_count > 1:
        raise BadInput(
            "--gc needs the cache for itself; run it afterwards, without --process_count"
        )
    if not 0 <= arguments.process_index < arguments.process_count <= MAX_PROCESSES:
        raise BadInput(
            f"--process_index {arguments.process_index} --process_count "
            f"{arguments.process_count}: expected 0 <= index < count <= {MAX_PROCESSES}"
        )
    return Process(arguments.process_index, arguments.process_count)


def _describe_rest(work: Work, num_records: int) -> str:
    return (
        f"{work.cache.folder}: this part is done, {num_records} records are left to the other "
        "processes; the last one completes the cache (if none did, run this one again)"
    )


def _report(config: TrainConfig) -> dict[str, Any]:
    dataset = Path(config.dataset)
    directories = read_directories(dataset, clip_mode=config.video_clip_mode)
    return report_dataset(
        [(directory.folder, directory.num_repeats) for directory in directories],
        Epoch(config.batching, load_dataset(dataset).subsample_ratio),
        title=f"Preflight of {dataset}",
        into=Path(config.output_dir),
        print_line=_print,
    )


def _encode_captions(todo: Sequence[MissingText], model: Path, devices: Sequence[Any]) -> None:
    if not todo:
        return
    encoder = load_fitting_text_encoder(model, memory_bytes=device_memory())
    tokenizer = load_tokenizer(tokenizer_folder(model))
    captions = [caption for caption, _ in todo]
    for caption in dict.fromkeys(captions):
        if is_cut(tokenizer, caption):
            _warn(
                f"a caption is cut at {TEXT_LEN} tokens, all that the model takes: {caption:.60}..."
            )
    encoders = [encoder]
    if isinstance(encoder, UMT5):  # one that is streamed would fill host memory with its copies
        num_used = -(-len(todo) // (CAPTIONS_AT_ONCE * BATCHES_A_DEVICE))
        encoders = copy_to_each(encoder, devices[:num_used])
    embeddings = encode_each(encoders, tokenizer, captions, at_once=CAPTIONS_AT_ONCE)
    with closing(embeddings), tqdm(desc="captions", total=len(todo), unit="caption") as bar:
        for (caption, cache), text_SE in zip(todo, embeddings, strict=True):
            cache.add(make_text_key(caption), text_SE, note=caption)
            bar.update()


def _list_missing_captions(jobs: Sequence[Work], more_captions: Sequence[str]) -> list[MissingText]:
    return [
        (caption, work.cache)
        for work in jobs
        for caption in dict.fromkeys([c for clip in work.clips for c in clip.captions])
        | dict.fromkeys(more_captions)
        if _is_to_do(make_text_key(caption), work.cache)
    ]


def _encode_clips(
    todo: Sequence[Missing], model: Path, vae_dtype: str, devices: Sequence[Any]
) -> None:
    if not todo:
        return
    vae = load_vae(model, dtype=vae_dtype)
    del vae.decoder  # 1 GB in bfloat16
    vaes = copy_to_each(vae, devices[: len(todo)])
    decoded = decode_ahead(todo, _decode, count_bytes=_count_bytes, num_devices=len(vaes))
    encoded = encode_clips(vaes, decoded)
    with closing(encoded), tqdm(desc="clips", total=len(todo), unit="clip") as bar:
        for (clip, writer), latents_TYXC in encoded:
            writer.add(_name_latents(clip), latents_TYXC)
            bar.update()


def _list_missing(jobs: Sequence[Work]) -> list[Missing]:
    missing = {
        (work.cache.folder, key): (clip, work.cache)
        for work in jobs
        for clip in work.clips
        if _is_to_do(key := _name_latents(clip), work.cache)
    }
    return list(missing.values())  # a file that is there twice is encoded once


def _is_to_do(key: str, cache: CacheWriter) -> bool:
    return cache.owns(key) and key not in cache


def _decode(missing: Missing) -> np.ndarray:
    clip, _ = missing
    pixels_TYX3 = read_clip(clip.path, clip.info, clip.bucket, start=clip.start)
    check_stamp(clip.path, clip.stamp)  # the digest is of the file that was surveyed
    return pixels_TYX3


def _count_bytes(missing: Missing) -> int:
    return count_frame_bytes(missing[0].bucket)


def _add_masks(work: Work) -> None:
    for clip in work.clips:
        key = _name_mask(clip)
        if clip.mask is not None and key is not None and _is_to_do(key, work.cache):
            work.cache.add(key, read_mask(clip.mask, clip.info, clip.bucket))


def _make_entry(clip: SourceClip) -> ClipEntry:
    text_keys = tuple(map(make_text_key, clip.captions))
    mask_key = _name_mask(clip)
    return ClipEntry(clip.file, clip.bucket, _name_latents(clip), text_keys, clip.start, mask_key)


def _name_latents(clip: SourceClip) -> str:
    return make_latents_key(clip.digest, clip.bucket, cut=clip.cut)


def _name_mask(clip: SourceClip) -> str | None:
    if clip.mask_digest is None:
        return None
    return make_mask_key(clip.mask_digest, clip.bucket)


def _check_space(work: Work) -> None:
    needed = sum(clip.bucket.num_bytes for clip, _ in _list_missing([work]))
    needed += min(needed, SHARD_BYTES)  # records lie there twice while a shard is written
    free = shutil.disk_usage(work.cache.folder).free
    if needed > free:
        raise BadInput(
            f"{work.cache.folder}: the cache needs {needed / 1e9:.3g} GB, the disk has "
            f"{free / 1e9:.3g} GB free; free some space and run the same command again"
        )


def _describe_devices(devices: Sequence[Any]) -> str:
    count = "one device" if len(devices) == 1 else f"{len(devices)} devices"
    of_all = f" of {jax.local_device_count()}" if len(devices) < jax.local_device_count() else ""
    return f"encoding on {count}{of_all} ({devices[0].device_kind})"


def _describe(jobs: Sequence[Work]) -> str:
    lines = [f"{'bucket':>16} {'clips':>7} {'tokens':>7} {'MB':>9}  cache"]
    for work in jobs:
        chosen = [clip.bucket for clip in work.clips]
        for bucket in sorted(set(chosen)):
            count = chosen.count(bucket)
            lines.append(
                f"{bucket!s:>16} {count:>7} {bucket.num_tokens:>7} "
                f"{count * bucket.num_bytes / 1e6:>9.1f}  {work.cache.folder}"
            )
    return "\n".join(lines) + "\n"


def _print(line: str) -> None:
    tqdm.write(one_line(line), file=sys.stdout)


def _warn(line: str) -> None:
    tqdm.write(f"warning: {one_line(line)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
