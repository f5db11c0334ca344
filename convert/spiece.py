"""How does a SentencePiece model, embedded in files made for ComfyUI, become ``tokenizer.json``?

``spiece.model`` is a protocol buffer: pieces with scores, and how text is normalised before it is
cut. The tokenizer made of it gives SentencePiece's own ids, with umT5's ``</s>`` at the end.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from wan22_jax.errors import BadInput
from wan22_jax.text import END

_UNIGRAM = 1
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of pieces
_SPACE = "▁"


def make_tokenizer_json(model: bytes, where: Path) -> bytes:
    """Makes the content of ``tokenizer.json`` from that of ``spiece.model``.

    Args:
        model: the protocol buffer.
        where: it came from, for messages.

    Raises:
        BadInput: it is damaged, or no model of the Unigram kind that umT5 has.
    """
    try:
        parsed = _parse_model(model)
    except (ValueError, struct.error) as error:
        raise BadInput(
            f"{where}: a SentencePiece model was expected ({error}); download it again"
        ) from error
    names = [piece.text for piece in parsed.pieces]
    unknown = [i for i, piece in enumerate(parsed.pieces) if piece.kind == _UNKNOWN]
    if parsed.kind != _UNIGRAM or len(unknown) != 1 or names.count(END) != 1:
        raise BadInput(
            f"{where}: umT5's SentencePiece model was expected, of the Unigram kind, with {END}; "
            "copy the tokenizer folder of the Wan2.2 model"
        )
    tokenizer = Tokenizer(
        models.Unigram(
            [(piece.text, piece.score) for piece in parsed.pieces],
            unk_id=unknown[0],
            byte_fallback=parsed.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(_make_normalizers(parsed))
    scheme = "always" if parsed.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(_SPACE, prepend_scheme=scheme, split=False)]
    )
    tokenizer.add_special_tokens(
        [piece.text for piece in parsed.pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, normalized=False)
            for piece in parsed.pieces
            if piece.kind == _USER_DEFINED
        ]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, names.index(END))]
    )
    return tokenizer.to_str().encode()


def _make_normalizers(parsed: "_Model") -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if parsed.charsmap:
        steps.append(normalizers.Precompiled(parsed.charsmap))
    if parsed.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    return steps


@dataclass
class _Piece:
    text: str = ""
    score: float = 0.0
    kind: int = 1


@dataclass
class _Model:
    """What matters of ModelProto, with its defaults (sentencepiece_model.proto)."""

    pieces: list[_Piece] = field(default_factory=list)
    kind: int = _UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def _parse_model(content: bytes) -> _Model:
    model = _Model()
    for number, value in _fields(content):
        if number == 1:
            model.pieces.append(_parse_piece(_as_bytes(value)))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
            model.kind = int(trainer.get(3, _UNIGRAM))
            model.byte_fallback = bool(trainer.get(35, False))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
            model.charsmap = _as_bytes(normalizer.get(2, b""))
            model.add_dummy_prefix = bool(normalizer.get(3, True))
            model.remove_extra_whitespaces = bool(normalizer.get(4, True))
    if not model.pieces:
        raise ValueError("it has no pieces")
    _check_charsmap(model.charsmap)
    return model


def _parse_piece(content: bytes) -> _Piece:
    piece = _Piece()
    for number, value in _fields(content):
        if number == 1:
            piece.text = _as_bytes(value).decode()
        elif number == 2:
            (piece.score,) = struct.unpack("<f", _as_bytes(value))
        elif number == 3:
            piece.kind = int(value)
    return piece


def _check_charsmap(charsmap: bytes) -> None:
    """The library that reads it reports damage with a bare Exception, so look before it does."""
    if charsmap:
        (trie_bytes,) = struct.unpack_from("<I", charsmap)
        if trie_bytes % 1024 or not 0 < trie_bytes <= len(charsmap) - 4:
            raise ValueError("its table of characters is damaged")
        charsmap[4 + trie_bytes :].decode()


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a text was expected")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Goes through a message: number and value of each field; what is no varint comes as bytes."""
    position = 0
    while position < len(content):
        key, position = _read_varint(content, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _read_varint(content, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _read_varint(content, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"a field of the unknown type {wire_type}")
        if position + length > len(content):
            raise ValueError("it is cut short")
        yield number, content[position : position + length]
        position += length


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            raise ValueError("it is cut short")
        byte = content[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a number of more than 64 bits")
