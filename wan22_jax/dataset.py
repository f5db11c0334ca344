"""What does a dataset file ask for: which folders, which buckets, which caches?"""

from pathlib import Path
from typing import Any, NamedTuple

from wan22_jax.config import DatasetConfig, DirectoryConfig, load_dataset
from wan22_jax.data.buckets import BucketRule, make_rule
from wan22_jax.data.cache import CACHE_FOLDER, Cache, open_cache
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

    path: Path
    num_repeats: float | int
    rule: BucketRule

    @property
    def cache_folder(self) -> Path:
        """Where its encoded clips lie."""
        return self.path / CACHE_FOLDER


def read_directories(dataset_file: Path) -> list[Directory]:
    """Reads the dataset file; raises BadInput if it asks for what the model cannot do."""
    dataset = load_dataset(dataset_file)
    directories = []
    for number, own in enumerate(dataset.directory):
        keys = {name: _inherit(name, own, dataset) for name in _RULE_KEYS}
        rule = make_rule(source=f"{dataset_file}: directory {number}", **keys)
        directories.append(Directory(Path(own.path), _inherit("num_repeats", own, dataset), rule))
    paths = [directory.path.resolve() for directory in directories]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise BadInput(
            f"{dataset_file}: {twice[0]} is listed twice; list it once (num_repeats repeats it)"
        )
    return directories


def open_caches(dataset_file: Path, *, encoders: str) -> list[tuple[Cache, float | int]]:
    """Opens every directory's cache, each with its ``num_repeats``.

    Args:
        dataset_file: the dataset TOML.
        encoders: ``name_encoders`` of the model in use.

    Raises:
        BadInput: as ``read_directories`` and ``open_cache``.
    """
    return [
        (
            open_cache(directory.cache_folder, encoders=encoders, buckets=directory.rule.buckets),
            directory.num_repeats,
        )
        for directory in read_directories(dataset_file)
    ]


def _inherit(name: str, own: DirectoryConfig, dataset: DatasetConfig) -> Any:
    return getattr(own if name in own.model_fields_set else dataset, name)
