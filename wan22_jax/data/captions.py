"""Which captions does a clip have?

They come from one of

  captions.json     {"a.mp4": ["one caption", "another"], ...}
  metadata.jsonl    {"video_path": "a.mp4", "caption": "one caption"}, one or more lines a file
  a.txt             beside a.mp4, UTF-8, stripped

A folder has one of the first two at most. It then speaks for every clip of the folder, and of the
folders below that have none of their own; names are relative to it. ``image_path`` and
``file_name`` are other words for ``video_path``, and ``text`` is one for ``caption``. As in
diffusion-pipe, a name that is not in captions.json has no caption, whatever lies beside the clip.
"""

import hashlib
import json
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from wan22_jax.errors import BadInput

CAPTIONS_FILE, METADATA_FILE = "captions.json", "metadata.jsonl"
_PATH_KEYS = ("video_path", "image_path", "file_name")
_TEXT_KEYS = ("caption", "text")


class CaptionRule(NamedTuple):
    """What becomes of captions as they are written."""

    prefix: str = ""  # before each
    num_shuffled: int = 0  # this many variants with shuffled tags instead of each; 0: as written
    delimiter: str = ", "  # between tags
    skip_empty: bool | None = None  # a clip without: leave out (True), use '' (False), or an error


class Captions:
    """The captions of one folder and of those below it."""

    def __init__(self, folder: Path, subfolders: Iterable[str]):
        """Reads the caption files.

        Args:
            folder: of the clips.
            subfolders: which to look into, relative to it; '.' is the folder itself.

        Raises:
            BadInput: a caption file is not what the top of this module says.
        """
        self._folder = folder
        tables = ((PurePosixPath(name), _read_table(folder / name)) for name in subfolders)
        self._tables = {name: table for name, table in tables if table is not None}

    def read(self, file: str) -> tuple[str, ...]:
        """Reads the captions of a file, given relative to the folder; () if it has none.

        Raises:
            BadInput: its .txt file cannot be read.
        """
        if (parent := self._find_table(file)) is not None:
            name = PurePosixPath(file).relative_to(parent)
            return self._tables[parent].captions.get(_normalize(str(name)), ())
        caption = _read_text((self._folder / file).with_suffix(".txt"))
        return () if caption is None else (caption.strip(),)

    def name_source(self, file: str) -> Path:
        """Names the file in which the captions of a file stand, or should."""
        if (parent := self._find_table(file)) is not None:
            return self._tables[parent].path
        return (self._folder / file).with_suffix(".txt")

    def list_unused(self, files: Iterable[str]) -> Iterator[str]:
        """Yields a line for every name in a caption file that none of the files has."""
        unused = {parent: dict(table.captions) for parent, table in self._tables.items()}
        for file in files:
            if (parent := self._find_table(file)) is not None:
                name = str(PurePosixPath(file).relative_to(parent))
                unused[parent].pop(_normalize(name), None)
        for parent, names in unused.items():
            for name in names:
                yield f"{self._tables[parent].path}: left out {name}, no clip has this name"

    def _find_table(self, file: str) -> PurePosixPath | None:
        parents = PurePosixPath(file).parents
        return next((parent for parent in parents if parent in self._tables), None)


def apply_rule(captions: Sequence[str], rule: CaptionRule) -> tuple[str, ...]:
    """Makes the captions that train: shuffled variants, then the prefix before each.

    Variant k of a caption depends on its text and on k alone, so it is encoded once for all runs.
    """
    variants = (
        [_shuffle_tags(caption, rule.delimiter, k) for k in range(rule.num_shuffled)] or [caption]
        for caption in captions
    )
    return tuple(rule.prefix + variant for some in variants for variant in some)


def _shuffle_tags(caption: str, delimiter: str, number: int) -> str:
    tags = enumerate(caption.split(delimiter))

    def draw(numbered: tuple[int, str]) -> bytes:
        return hashlib.sha256(f"{number} {numbered[0]} {caption}".encode()).digest()

    return delimiter.join(tag for _, tag in sorted(tags, key=draw))


class _Table(NamedTuple):
    path: Path
    captions: Mapping[str, tuple[str, ...]]  # normalised file name -> captions


def _read_table(folder: Path) -> _Table | None:
    captions_path, metadata_path = folder / CAPTIONS_FILE, folder / METADATA_FILE
    captions_text, metadata_text = _read_text(captions_path), _read_text(metadata_path)
    if captions_text is not None and metadata_text is not None:
        raise BadInput(f"{captions_path}: {METADATA_FILE} lies beside it; remove one of them")
    if captions_text is not None:
        return _Table(captions_path, _parse_captions(captions_text, captions_path))
    if metadata_text is not None:
        return _Table(metadata_path, _parse_metadata(metadata_text, metadata_path))
    return None


def _parse_captions(text: str, path: Path) -> dict[str, tuple[str, ...]]:
    tree = _parse_json(text, str(path))
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: expected an object, file name -> list of captions")
    for name, captions in tree.items():
        if not _is_list_of_text(captions):
            raise BadInput(f"{path}: {name}: expected a list of captions, got {captions!r:.80}")
    table = {_normalize(name): tuple(map(str.strip, tree[name])) for name in tree}
    if len(table) < len(tree):
        raise BadInput(f"{path}: a file is there under two spellings of its name; join them")
    return table


def _parse_metadata(text: str, path: Path) -> dict[str, tuple[str, ...]]:
    captions: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        row = _parse_json(line, where)
        if not isinstance(row, dict):
            raise BadInput(f"{where}: expected an object with video_path and caption")
        name, found = _pick(row, _PATH_KEYS, where), _pick(row, _TEXT_KEYS, where)
        found = [found] if isinstance(found, str) else found
        if not isinstance(name, str) or not _is_list_of_text(found):
            raise BadInput(f"{where}: expected text as file name and caption, got {line!r:.80}")
        name = _normalize(name)
        captions[name] = captions.get(name, ()) + tuple(map(str.strip, found))
    return captions


def _pick(row: dict[str, Any], keys: Sequence[str], where: str) -> Any:
    present = [key for key in keys if key in row]
    if len(present) != 1:
        raise BadInput(f"{where}: expected one of {', '.join(keys)}, found {present or 'none'}")
    return row[present[0]]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_make_object)
    except _DuplicateKeyError as error:
        raise BadInput(f"{where}: {error} is there twice; join both into one") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: is not valid JSON ({error})") from None


class _DuplicateKeyError(Exception):
    """A key that an object has twice, of which JSON readers drop the first."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return made


def _is_list_of_text(value: Any) -> bool:
    # Half of a surrogate pair, which JSON can spell, is no text: it cannot be encoded.
    return isinstance(value, list) and all(
        isinstance(item, str) and not any("\ud800" <= c <= "\udfff" for c in item) for item in value
    )


def _normalize(name: str) -> str:
    # macOS writes file names decomposed; whoever types the list does not.
    return unicodedata.normalize("NFC", str(PurePosixPath(name)))


def _read_text(path: Path) -> str | None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would keep its reader waiting
            raise BadInput(f"{path}: is not a file; remove it")
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: is not UTF-8 (byte {error.start}); save it again as UTF-8"
        ) from None
