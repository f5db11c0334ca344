"""Which clips and captions does a folder hold, and what is wrong with it?

Everything that can be known before encoding is found here, so that a run of hours does not end on
a bad file: all problems are reported at once. Nothing is left out without a word.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from wan22_jax.data.buckets import BucketRule, assign_buckets
from wan22_jax.data.cache import CACHE_FOLDER
from wan22_jax.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaInfo, probe
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket

# What diffusion-pipe passes over, and what lies beside data sets.
SIDE_SUFFIXES = frozenset([".txt", ".json", ".jsonl", ".npz", ".parquet", ".bak", ".db"])
SHOWN_PROBLEMS = 5


class SourceClip(NamedTuple):
    """One media file that trains."""

    path: Path
    info: MediaInfo
    digest: str  # sha256 of the file's bytes
    caption: str
    buckets: tuple[Bucket, ...]  # one per resolution


def survey_folder(
    folder: Path, rule: BucketRule, *, warn: Callable[[str], None]
) -> list[SourceClip]:
    """Reads every media file and caption of a folder, in the order of their names.

    A caption is the file of the same stem ending in .txt, UTF-8, stripped; it may be empty.

    Args:
        folder: its own files are read, those of sub-folders are not.
        rule: the buckets to choose from.
        warn: takes one line for each thing that is left out without being an error.

    Raises:
        BadInput: the folder is missing or empty, or any file cannot be trained on; one message
            counts all such files and quotes the first.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; correct path in the dataset file")
    if (folder / "captions.json").exists():
        raise BadInput(
            f"{folder / 'captions.json'}: is not supported by this version yet; "
            "write each caption into a .txt file beside its clip"
        )
    media = _find_media(folder, warn)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            found = pool.map(partial(_survey_file, rule=rule), media)
            results = list(tqdm(found, f"reading {folder}", len(media), unit="file"))
        finally:  # Ctrl-C does not wait for the files still in line
            pool.shutdown(cancel_futures=True)
    problems = [result for result in results if isinstance(result, str)]
    if len(problems) == 1:
        raise BadInput(problems[0])
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        raise BadInput(
            f"{folder}: {len(problems)} of {len(media)} files cannot be used: "
            + " | ".join(problems[:SHOWN_PROBLEMS])
            + (f" | and {more} more" if more > 0 else "")
        )
    return [result for result in results if not isinstance(result, str)]


def _find_media(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    media = []
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in entries:
        suffix = path.suffix.lower()
        if path.is_dir():
            if path.name != CACHE_FOLDER.parts[0]:
                warn(f"{path}: sub-folders are not read; give it a [[directory]] of its own")
        elif suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            media.append(path)
        elif suffix not in SIDE_SUFFIXES:
            warn(f"{path}: left out, {suffix or 'no suffix'} is not a known kind of video or image")
    if not media:
        raise BadInput(
            f"{folder}: holds no videos or images; put clips (.mp4, .png, ...) and captions "
            "(.txt of the same name) there, or correct path in the dataset file"
        )
    stems = {path.stem for path in media}
    for path in entries:
        if path.suffix.lower() == ".txt" and path.stem not in stems:
            warn(f"{path}: left out, no clip has this name")
    return media


def _survey_file(path: Path, *, rule: BucketRule) -> SourceClip | str:
    try:
        info = probe(path)
        buckets = assign_buckets(info, rule, source=str(path))
        caption = _read_caption(path.with_suffix(".txt"))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except BadInput as problem:
        return str(problem)
    return SourceClip(path, info, digest, caption, buckets)


def _read_caption(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        raise BadInput(f"{path}: caption missing; write it, or remove the clip") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: is not UTF-8 (byte {error.start}); save it again as UTF-8"
        ) from None
