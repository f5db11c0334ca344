"""What does a dataset file ask for: which folders, which buckets, which caches?"""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from wan22_jax.config import load_dataset
from wan22_jax.data.buckets import BucketRule, make_rule
from wan22_jax.data.cache import Cache, open_cache
from wan22_jax.data.captions import CaptionRule
from wan22_jax.data.cuts import CutRule
from wan22_jax.data.survey import Folder
from wan22_jax.dataset_config import ClipMode, DatasetConfig, DirectoryConfig
from wan22_jax.errors import BadInput

_RULE_KEYS = (
    "resolutions",
    "frame_buckets",
    "enable_ar_bucket",
    "min_ar",
    "max_ar",
    "num_ar_buckets",
    "ar_buckets",
    "size_buckets",
)


class Directory(NamedTuple):
    """One ``[[directory]]``, with what it takes over from the top of the file."""

    folder: Folder
    num_repeats: float | int

    @property
    def path(self) -> Path:
        """Where its clips lie."""
        return self.folder.path

    @property
    def rule(self) -> BucketRule:
        """Its buckets."""
        return self.folder.rule

    @property
    def cache_folder(self) -> Path:
        """Where its encoded clips lie."""
        return self.folder.cache_folder


def read_directories(
    dataset_file: Path, *, clip_mode: ClipMode = "single_beginning"
) -> list[Directory]:
    """Reads the dataset file.

    Args:
        dataset_file: the dataset TOML.
        clip_mode: ``video_clip_mode`` of the main file, which the dataset file may override.

    Raises:
        BadInput: it asks for what the model cannot do, or for the same folder twice.
    """
    dataset = load_dataset(dataset_file)
    directories = []
    for number, own in enumerate(dataset.directory):
        source = f"{dataset_file}: directory {number}"
        keys = {name: _inherit(name, own, dataset) for name in _RULE_KEYS}
        folder = Folder(
            Path(own.path),
            make_rule(source=source, **keys),
            _make_caption_rule(own, dataset),
            _make_cut_rule(own, dataset, clip_mode, source),
            _inherit("recursive", own, dataset),
            None if own.mask_path is None else Path(own.mask_path),
            None if own.default_mask_file is None else Path(own.default_mask_file),
            _check_first_frames(own, dataset, clip_mode, source),
        )
        _check_default_mask(folder, source)
        directories.append(Directory(folder, _inherit("num_repeats", own, dataset)))
    _check_apart(directories, dataset_file)
    return directories


def read_datasets(
    dataset_files: Sequence[Path], *, clip_mode: ClipMode = "single_beginning"
) -> list[Directory]:
    """Reads several dataset files of one run; a folder that two of them use alike comes once.

    Raises:
        BadInput: as ``read_directories``, or two files use one folder, and so its one cache, each
            in its own way.
    """
    found: dict[Path, tuple[Path, Directory]] = {}
    for file in dict.fromkeys(dataset_files):
        for directory in read_directories(file, clip_mode=clip_mode):
            path = Path(os.path.realpath(directory.path))
            first_file, first = found.setdefault(path, (file, directory))
            if first.folder != directory.folder:
                raise BadInput(
                    f"{file}: {directory.path} is also a folder of {first_file}, with other "
                    "buckets or options; make them the same there, or copy the clips to a folder "
                    "of their own"
                )
    return [directory for _, directory in found.values()]


def choose_uncond_fraction(dataset_file: Path, *, in_main_file: float | int) -> float | int:
    """Returns the share of captions to replace by '': the dataset file's, or the main file's."""
    own = load_dataset(dataset_file).uncond_fraction
    return in_main_file if own is None else own


def open_caches(
    dataset_file: Path, *, encoders: str, clip_mode: ClipMode = "single_beginning"
) -> list[tuple[Cache, float | int]]:
    """Opens every directory's cache, each with its ``num_repeats``.

    Args:
        dataset_file: the dataset TOML.
        encoders: ``name_encoders`` of the model in use.
        clip_mode: ``video_clip_mode`` of the main file.

    Raises:
        BadInput: as ``read_directories`` and ``open_cache``.
    """
    return [
        (
            open_cache(
                directory.cache_folder,
                encoders=encoders,
                buckets=directory.rule.buckets,
                options=directory.folder.options,
            ),
            directory.num_repeats,
        )
        for directory in read_directories(dataset_file, clip_mode=clip_mode)
    ]


def _make_caption_rule(own: DirectoryConfig, dataset: DatasetConfig) -> CaptionRule:
    num_shuffled = _inherit("cache_shuffle_num", own, dataset)
    if _inherit("shuffle_tags", own, dataset):  # diffusion-pipe's older key
        num_shuffled = max(num_shuffled, 1)
    return CaptionRule(
        _inherit("caption_prefix", own, dataset),
        num_shuffled,
        _inherit("cache_shuffle_delimiter", own, dataset),
        _inherit("skip_empty_caption", own, dataset),
    )


def _make_cut_rule(
    own: DirectoryConfig, dataset: DatasetConfig, clip_mode: ClipMode, source: str
) -> CutRule:
    mode = _inherit("video_clip_mode", own, dataset) or clip_mode
    num_clips = _inherit("clips_per_video", own, dataset)
    if mode == "uniform" and num_clips is None:
        raise BadInput(f"{source}: video_clip_mode = 'uniform' needs clips_per_video = <number>")
    if mode != "uniform" and own.clips_per_video is not None:
        raise BadInput(f"{source}: clips_per_video needs video_clip_mode = 'uniform'")
    return CutRule(mode, num_clips or 1, None if own.fps is None else Fraction(str(own.fps)))


def _check_first_frames(
    own: DirectoryConfig, dataset: DatasetConfig, clip_mode: ClipMode, source: str
) -> Path | None:
    if own.first_frame_path is None:
        return None
    if (_inherit("video_clip_mode", own, dataset) or clip_mode) != "single_beginning":
        raise BadInput(
            f"{source}: first_frame_path needs video_clip_mode = 'single_beginning'; other clips "
            "start elsewhere"
        )
    return Path(own.first_frame_path)


def _check_default_mask(folder: Folder, source: str) -> None:
    mask = folder.default_mask_file
    if mask is not None and not mask.is_file():
        raise BadInput(f"{source}: default_mask_file = '{mask}': no such file")


def _check_apart(directories: list[Directory], dataset_file: Path) -> None:
    # Path.resolve stops at a link that leads to itself; the survey says that it is no folder.
    resolved = [Path(os.path.realpath(directory.path)) for directory in directories]
    for number, path in enumerate(resolved):
        for other, directory in enumerate(directories):
            if other == number:
                continue
            if resolved[other] == path:
                raise BadInput(
                    f"{dataset_file}: {path} is listed twice; list it once (num_repeats repeats it)"
                )
            if directory.folder.recursive and path.is_relative_to(resolved[other]):
                raise BadInput(
                    f"{dataset_file}: {path} lies in {resolved[other]}, which is read with all "
                    "its sub-folders; drop one of them, or recursive"
                )


def _inherit(name: str, own: DirectoryConfig, dataset: DatasetConfig) -> Any:
    return getattr(own if name in own.model_fields_set else dataset, name)
