"""Where do encoded clips and captions lie on disk, and how do they get back?

A cache folder holds

  cache.json               which encoders made it; written first
  0000-00000.array_record  shards of each writing process; a record is one array (safetensors)
  0000-00000.keys          the packed keys of a shard's records, in order; its presence = complete
  pending/0000/            records that are not in a shard yet
  clips.index              the data set: each clip's file, bucket and records (index.py); last
  lock-0000                held by a process while it writes

Latents, captions and masks are records of their own, keyed by content, so that an edited caption
re-encodes one text and nothing else. ``cache_writer.py`` writes.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from safetensors import SafetensorError, deserialize

from wan22_jax.batch import CachedClip
from wan22_jax.data.index import BAD_INDEX, NO_OPTIONS, NOWHERE, Index, Shard
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket

CACHE_FOLDER = Path("cache", "wan2.2_5b")  # below the clips' folder, as in diffusion-pipe
VERSION = 2  # of the layout above and of the way from file to pixels (data/video.py)
HEADER, INDEX = "cache.json", "clips.index"
REMEDY = "run wan22-cache on this dataset"
T = TypeVar("T")
MAX_OPEN_SHARDS = 128  # far below what a process may have open


def name_encoders(digests: Mapping[str, str], *, vae_dtype: str) -> str:
    """Names the encoders of a model card by their content digests; another name, another cache."""
    precision = "" if vae_dtype == "float32" else f" in {vae_dtype}"  # as early caches were named
    return f"vae {digests['vae'][:16]}{precision}, text_encoder {digests['text_encoder'][:16]}"


def make_latents_key(media_digest: str, bucket: Bucket, *, cut: str = "single_beginning") -> str:
    """Names the latents of one clip of a file in a bucket; ``cut`` says which frames it has."""
    return f"latents-{_hash(f'{media_digest} {bucket} {cut}')}"


def make_text_key(caption: str) -> str:
    """Names the embedding of a caption."""
    return f"text-{_hash(caption)}"


def make_mask_key(mask_digest: str, bucket: Bucket) -> str:
    """Names a mask, as a record [Y, X] in [0, 1] on the latent grid of a bucket."""
    return f"mask-{_hash(f'{mask_digest} {bucket.width_px}x{bucket.height_px}')}"


class Cache:
    """A complete cache folder, open for reading from any number of threads.

    Attributes:
        clips: the data set; a clip is named by its number in here.
    """

    def __init__(self, folder: Path, clips: Index):
        self.folder = folder
        self.clips = clips
        for shard in clips.shards:
            check_shard(folder, shard)
        self._end_row = np.cumsum([shard.num_records for shard in clips.shards], dtype=np.int64)
        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(self._open_shard)

    @functools.cached_property
    def uncond_row(self) -> int:
        """The record of the empty caption, or NOWHERE."""
        return self.clips.find(make_text_key(""))

    def read(self, number: int, *, caption: int | None = 0) -> CachedClip:
        """Reads one clip; bfloat16, as stored.

        Args:
            number: of the clip in ``clips``.
            caption: which of its captions; None for the empty one.

        Raises:
            BadInput: its record is damaged.
        """
        mask_row = self.clips.mask_row(number)
        return CachedClip(
            self._read(number, self.clips.latents_row(number), unpack_record),
            self._read(number, self._text_row(number, caption), unpack_record),
            None if mask_row == NOWHERE else self._read(number, mask_row, unpack_record),
        )

    def read_caption(self, number: int, *, caption: int | None = 0) -> str:
        """Reads the caption itself; arguments and exception are those of ``read``."""
        return self._read(number, self._text_row(number, caption), unpack_note)

    def read_record(self, row: int) -> bytes:
        """Reads a record; raises one of ``DAMAGE`` if it cannot be read."""
        shard = self._find_shard(row)
        begin = int(self._end_row[shard]) - self.clips.shards[shard].num_records
        return self._open(shard).read([row - begin])[0]

    def name_shard(self, row: int) -> str:
        """Names the file of a record."""
        return self.clips.shards[self._find_shard(row)].name

    def _find_shard(self, row: int) -> int:
        return int(np.searchsorted(self._end_row, row, side="right"))

    def _read(self, number: int, row: int, unpack: Callable[[bytes], T]) -> T:
        try:
            return unpack(self.read_record(row))
        except DAMAGE as error:
            raise BadInput(
                f"{self.folder}: the record of {self.clips.file(number)} is damaged ({error}); "
                f"{mend_shards([self.name_shard(row)])}"
            ) from None

    def _text_row(self, number: int, caption: int | None) -> int:
        return self.uncond_row if caption is None else self.clips.text_rows(number)[caption]

    def _open_shard(self, shard: int) -> ArrayRecordReader:
        path = self.folder / self.clips.shards[shard].name
        return ArrayRecordReader(str(path), options="readahead_buffer_size:0")


DAMAGE = (RuntimeError, ValueError, IndexError, SafetensorError)  # raised by a damaged record


def open_cache(
    folder: Path,
    *,
    encoders: str,
    buckets: Sequence[Bucket],
    options: Mapping[str, str] = NO_OPTIONS,
) -> Cache:
    """Opens the cache of one clips' folder.

    Args:
        folder: the cache folder.
        encoders: ``name_encoders`` of the model in use.
        buckets: every bucket that the dataset file asks for now.
        options: what else it asks for, see ``Folder.options``.

    Raises:
        BadInput: no complete cache, or one made by other encoders, for other buckets or options.
    """
    if (folder / HEADER).is_file():
        check_header(folder, encoders=encoders)
    if not (folder / INDEX).is_file():
        raise BadInput(f"{folder}: holds no complete cache; {REMEDY}")
    try:
        clips = Index(folder / INDEX)
    except BAD_INDEX as error:
        raise BadInput(f"{folder / INDEX}: is damaged ({error}); {REMEDY} again") from None
    if changes := clips.describe_changes(buckets, options):
        raise BadInput(f"{folder}: {changes}; {REMEDY} again (what is still right is kept)")
    return Cache(folder, clips)


def check_header(folder: Path, *, encoders: str) -> None:
    """Raises BadInput if other encoders, or another version of this program, made a cache."""
    try:
        header = json.loads((folder / HEADER).read_text("utf-8"))
        version, made_by = header["version"], header["encoders"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(f"{folder / HEADER}: is damaged; {REMEDY} with --regenerate_cache") from None
    if version != VERSION:
        raise BadInput(
            f"{folder}: has cache version {version}, this program writes {VERSION}; "
            "run wan22-cache with --regenerate_cache"
        )
    if made_by != encoders:
        raise BadInput(
            f"{folder}: was made by other encoders ({made_by}); this model has {encoders}; "
            "run wan22-cache with --regenerate_cache, or use the model and vae_dtype that made it "
            "(none named: 'float32')"
        )


def mend_shards(names: Iterable[str]) -> str:
    """Says what helps where shards are damaged."""
    patterns = ", ".join(f"{Path(name).stem}.*" for name in names)
    return f"delete {patterns} there and run wan22-cache again, which encodes what was in them"


def check_shard(folder: Path, shard: Shard) -> None:
    """Raises BadInput if a shard is not there."""
    if not (folder / shard.name).is_file():
        raise BadInput(f"{folder / shard.name}: is gone; {mend_shards([shard.name])}")


def unpack_record(record: bytes) -> np.ndarray:
    """Returns the array of a record; raises one of ``DAMAGE``."""
    # safetensors.numpy.load knows bfloat16 in files only.
    ((_, tensor),) = deserialize(record)
    return np.frombuffer(tensor["data"], ml_dtypes.bfloat16).reshape(tensor["shape"])


def unpack_note(record: bytes) -> str:
    """Returns what a record says of itself (a text its caption, others nothing)."""
    size = int.from_bytes(record[:8], "little")
    return json.loads(record[8 : 8 + size]).get("__metadata__", {}).get("note", "")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]
