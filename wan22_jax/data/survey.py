"""What does a folder yield: which clips, and what is wrong with the rest of it?

Everything that can be known before encoding is found here, so that a run of hours does not end on
a bad file. Each file comes out with its clips, or with the reason why it has none; nothing is left
out without a word. What is learnt of a file is kept, so that it is read and hashed once.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from wan22_jax.data.buckets import BucketRule, assign_buckets
from wan22_jax.data.cache import CACHE_FOLDER
from wan22_jax.data.captions import CaptionRule, Captions, apply_rule
from wan22_jax.data.companions import (
    check_first_frame,
    check_mask,
    digest_file,
    list_companions,
    list_unused,
    list_without,
)
from wan22_jax.data.cuts import CutRule, choose_starts, name_cut, retime
from wan22_jax.data.probed import Facts, Stamp, read_stamp
from wan22_jax.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaInfo, probe
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket

# What diffusion-pipe passes over, and what lies beside data sets.
SIDE_SUFFIXES = frozenset([".txt", ".json", ".jsonl", ".npz", ".parquet", ".bak", ".db"])
SHOWN_PROBLEMS = 5
_AT_ONCE = 1024  # files handed to the threads together


class Folder(NamedTuple):
    """One ``[[directory]]``: where clips lie and what is to become of them."""

    path: Path
    rule: BucketRule
    captions: CaptionRule = CaptionRule()
    cuts: CutRule = CutRule()
    recursive: bool = False
    mask_path: Path | None = None  # folder of images named like the clips
    default_mask_file: Path | None = None  # for clips that have none there
    first_frame_path: Path | None = None  # folder of images named like the clips

    @property
    def cache_folder(self) -> Path:
        """Where encoded clips lie, and what was learnt of the files."""
        return self.path / CACHE_FOLDER

    @property
    def options(self) -> dict[str, str]:
        """What of it, beside the buckets, decides which clips and captions there are.

        By key of the dataset file, where it is not the default.
        """
        options = {
            "video_clip_mode": (self.cuts.mode, CutRule().mode),
            "clips_per_video": (self.cuts.num_clips, CutRule().num_clips),
            "fps": (self.cuts.fps, None),
            "caption_prefix": (self.captions.prefix, ""),
            "cache_shuffle_num": (self.captions.num_shuffled, 0),
            "cache_shuffle_delimiter": (self.captions.delimiter, CaptionRule().delimiter),
            "skip_empty_caption": (self.captions.skip_empty, None),
            "recursive": (self.recursive, False),
            "mask_path": (self.mask_path, None),
            "default_mask_file": (self.default_mask_file, None),
        }
        return {key: repr(str(own)) for key, (own, usual) in options.items() if own != usual}


class SourceClip(NamedTuple):
    """One clip to encode: some frames of a file in one bucket."""

    path: Path
    file: str  # relative to the folder, with slashes
    stamp: Stamp  # of the file, when it was surveyed
    info: MediaInfo  # retimed
    digest: str  # sha256 of the file's bytes
    bucket: Bucket
    start: int  # first frame, at 24 fps
    cut: str  # names these frames of the file
    captions: tuple[str, ...]
    mask: Path | None
    mask_digest: str | None


class Outcome(NamedTuple):
    """What became of one file; ``reason`` says why it has no clips."""

    path: Path
    file: str
    info: MediaInfo | None  # as the file says; None if it could not be read
    clips: tuple[SourceClip, ...]
    verdict: Literal["used", "skipped", "dropped", "error"]
    reason: str = ""


def survey_folder(folder: Folder, *, warn: Callable[[str], None]) -> Iterator[Outcome]:
    """Looks at every media file of a folder, in the order of their names.

    A file is 'skipped' where the dataset file says so, 'dropped' if it is sound but no bucket
    takes it, and an 'error' otherwise. Memory does not grow with the number of files, but for
    their names and what was learnt of them.

    Args:
        folder: the folder and its options.
        warn: takes one line for each thing that lies there and is no clip.

    Raises:
        BadInput: the folder, its masks, first frames or caption files are missing or unreadable.
    """
    files, subfolders = _list_files(folder, warn)
    captions = Captions(folder.path, subfolders)
    masks = list_companions(folder.mask_path) if folder.mask_path else {}
    firsts = list_companions(folder.first_frame_path) if folder.first_frame_path else {}
    for line in captions.list_unused(files):
        warn(line)
    for path in list_unused(masks, files) + list_unused(firsts, files):
        warn(f"{path}: left out, no clip has this name")
    bare = list_without(masks, files)
    if folder.mask_path is not None and folder.default_mask_file is None and bare:
        warn(
            f"{folder.mask_path}: has no mask for {len(bare)} of {len(files)} files, such as "
            f"{bare[0]}; the loss of these counts everywhere"
        )
    with (
        Facts(folder.cache_folder) as facts,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(desc=f"reading {folder.path}", total=len(files), unit="file") as bar,
    ):
        look = partial(
            _survey_file, folder=folder, captions=captions, facts=facts, masks=masks, firsts=firsts
        )
        try:
            for begin in range(0, len(files), _AT_ONCE):
                for outcome in pool.map(look, files[begin : begin + _AT_ONCE]):
                    bar.update()
                    yield outcome
        finally:  # Ctrl-C does not wait for the files still in line
            pool.shutdown(cancel_futures=True)


def take_clips(
    folder: Path,
    outcomes: Iterable[Outcome],
    *,
    allow_drop: bool,
    warn: Callable[[str], None],
) -> list[SourceClip]:
    """Returns the clips of a survey, if no file stands in the way.

    Args:
        folder: for messages.
        outcomes: of ``survey_folder``.
        allow_drop: leave out the files that no bucket takes.
        warn: takes one line for each file that is left out.

    Raises:
        BadInput: files cannot be used, or no clip is left; one message counts them and quotes the
            first.
    """
    clips: list[SourceClip] = []
    problems: list[str] = []
    num_files = 0
    for outcome in outcomes:
        num_files += 1
        clips += outcome.clips
        if outcome.verdict == "error" or (outcome.verdict == "dropped" and not allow_drop):
            problems.append(outcome.reason)
        elif outcome.verdict != "used":
            warn(f"left out: {outcome.reason}")
    if len(problems) == 1:
        raise BadInput(problems[0])
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        raise BadInput(
            f"{folder}: {len(problems)} of {num_files} files cannot be used: "
            + " | ".join(problems[:SHOWN_PROBLEMS])
            + (f" | and {more} more; --dry-run lists them all" if more > 0 else "")
        )
    if not clips:
        raise BadInput(f"{folder}: every file is left out; nothing remains to train on")
    return clips


def _survey_file(
    file: str,
    *,
    folder: Folder,
    captions: Captions,
    facts: Facts,
    masks: dict[str, Path],
    firsts: dict[str, Path],
) -> Outcome:
    path, stem = folder.path / file, file.rpartition(".")[0]
    in_file = None
    try:
        stamp = read_stamp(path)
        in_file, digest = _unpack(facts.recall(file, {path: stamp}, partial(_learn, path)))
        info = retime(in_file, folder.cuts)
        try:
            buckets = assign_buckets(info, folder.rule, source=str(path))
        except BadInput as misfit:
            return Outcome(path, file, in_file, (), "dropped", str(misfit))
        texts = _choose_captions(file, captions, folder.captions)
        if not texts:
            reason = f"{path}: no caption, and skip_empty_caption is set"
            return Outcome(path, file, in_file, (), "skipped", reason)
        mask, mask_digest = masks.get(stem, folder.default_mask_file), None
        if mask is not None:
            sizes = f"mask {mask} {info.width_px}x{info.height_px}"
            learn = partial(check_mask, mask, info)
            mask_digest = facts.recall(sizes, {mask: read_stamp(mask)}, learn)
        if stem in firsts and not info.is_image:
            both = {path: stamp, firsts[stem]: read_stamp(firsts[stem])}
            learn = partial(check_first_frame, firsts[stem], path, info)
            facts.recall(f"first {firsts[stem]} {file}", both, learn)
    except BadInput as problem:
        return Outcome(path, file, in_file, (), "error", str(problem))
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror})"
        return Outcome(path, file, in_file, (), "error", reason)
    clips = tuple(
        SourceClip(
            path, file, stamp, info, digest, bucket, start,
            name_cut(start, info, fps_in_file=in_file.fps),
            texts, mask, mask_digest,
        )
        for bucket in buckets
        for start in choose_starts(info, bucket.frames, folder.cuts)
    )  # fmt: skip
    return Outcome(path, file, in_file, clips, "used")


def _learn(path: Path) -> list[Any]:
    info = probe(path)
    return [[*info[:3], str(info.fps), info.is_image, info.is_uneven], digest_file(path)]


def _unpack(fact: list[Any]) -> tuple[MediaInfo, str]:
    (width_px, height_px, frames, fps, is_image, is_uneven), digest = fact
    return MediaInfo(width_px, height_px, frames, Fraction(fps), is_image, is_uneven), digest


def _choose_captions(file: str, captions: Captions, rule: CaptionRule) -> tuple[str, ...]:
    written = captions.read(file)
    if rule.skip_empty:
        written = tuple(filter(None, written))
    elif not written:
        if rule.skip_empty is None:
            raise BadInput(
                f"{captions.name_source(file)}: caption missing; write it, remove {file}, or "
                "say with skip_empty_caption what becomes of clips without one"
            )
        written = ("",)
    return apply_rule(written, rule)


def _list_files(folder: Folder, warn: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """Lists media files and the folders that were looked into, both relative."""
    if not folder.path.is_dir():
        raise BadInput(f"{folder.path}: no such folder; correct path in the dataset file")
    own = (folder.mask_path, folder.first_frame_path, folder.default_mask_file)
    aside = {os.path.realpath(path) for path in own if path}  # Path.resolve stops at a loop
    files: list[str] = []
    subfolders: list[str] = []
    waiting = [Path()]
    while waiting:
        below = waiting.pop()
        subfolders.append(below.as_posix())
        with os.scandir(folder.path / below) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        if aside:
            entries = [entry for entry in entries if os.path.realpath(entry) not in aside]
        files += _sort_out(below, [entry for entry in entries if not _is_folder(entry)], warn)
        for entry in reversed(list(filter(_is_folder, entries))):
            if below / entry.name == Path(CACHE_FOLDER.parts[0]) or _is_cache(entry):
                continue
            if not folder.recursive:
                warn(
                    f"{entry.path}: sub-folders are not read; set recursive = true, or give it a "
                    "[[directory]] of its own"
                )
            elif entry.is_symlink():
                warn(f"{entry.path}: left out, links to folders are not followed")
            else:
                waiting.append(below / entry.name)
    if not files:
        raise BadInput(
            f"{folder.path}: holds no videos or images; put clips (.mp4, .png, ...) and captions "
            "(.txt of the same name) there, or correct path in the dataset file"
        )
    return sorted(files), subfolders


def _is_cache(entry: os.DirEntry[str]) -> bool:
    """Whether a sub-folder was cached on its own before."""
    name, model = CACHE_FOLDER.parts
    return entry.name == name and Path(entry.path, model).is_dir()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop; it shows when the file is read
        return False


def _sort_out(
    below: Path, entries: Sequence[os.DirEntry[str]], warn: Callable[[str], None]
) -> Iterator[str]:
    names = [Path(entry.name) for entry in entries]
    known = VIDEO_SUFFIXES | IMAGE_SUFFIXES
    stems = {name.stem for name in names if name.suffix.lower() in known}
    for name, entry in zip(names, entries, strict=True):
        suffix = name.suffix.lower()
        if suffix in known:
            yield (below / name).as_posix()
        elif suffix == ".txt" and name.stem not in stems:
            warn(f"{entry.path}: left out, no clip has this name")
        elif suffix not in SIDE_SUFFIXES:
            kind = suffix or "no suffix"
            warn(f"{entry.path}: left out, {kind} is not a known kind of video or image")
