"""The tables of a dataset file; ``config.load_dataset`` reads them."""

from typing import Any, Literal

from pydantic import Field

from wan22_jax.toml_file import Table

Number = int | float
ClipMode = Literal["single_beginning", "single_middle", "uniform"]


class ClipKeys(Table):
    """What may stand at the top of the dataset file, and differently in one ``[[directory]]``.

    ``video_clip_mode`` wins over that of the main file; 'uniform' takes ``clips_per_video`` clips
    of each file. ``skip_empty_caption`` says what a clip without caption is: left out (true), or
    trained with '' (false); an error if it is not set.
    """

    num_repeats: Number = Field(1, gt=0, le=10**6)
    resolutions: list[Number | list[Number]] | None = None
    enable_ar_bucket: bool = False
    min_ar: Number | None = Field(None, gt=0)
    max_ar: Number | None = Field(None, gt=0)
    num_ar_buckets: int | None = Field(None, ge=1, le=1000)
    ar_buckets: list[Number | list[Number]] | None = None
    frame_buckets: list[int] = Field(default=[1])
    size_buckets: list[list[int]] | None = None
    caption_prefix: str = ""
    shuffle_tags: bool = False
    cache_shuffle_num: int = Field(0, ge=0, le=1000)
    cache_shuffle_delimiter: str = Field(", ", min_length=1)
    skip_empty_caption: bool | None = None
    recursive: bool = False
    video_clip_mode: ClipMode | None = None
    clips_per_video: int | None = Field(None, ge=1, le=1000)
    shuffle_metadata: Any = None
    online_captions: Any = None


class DirectoryConfig(ClipKeys):
    """One ``[[directory]]`` of clips; a key that it does not set comes from the top of the file.

    ``fps`` is taken for the rate of its videos, whatever they say. ``mask_path`` and
    ``first_frame_path`` are folders of pictures named like the clips.
    """

    path: str
    fps: Number | None = Field(None, ge=0.1, le=1000)
    mask_path: str | None = None
    default_mask_file: str | None = None
    first_frame_path: str | None = None
    control_path: Any = None


class DatasetConfig(ClipKeys):
    """The dataset file; its ``uncond_fraction`` wins over that of the main file."""

    directory: list[DirectoryConfig] = Field(min_length=1)
    subsample_ratio: Number | None = Field(None, gt=0, le=1)
    uncond_fraction: Number | None = Field(None, ge=0, le=1)
