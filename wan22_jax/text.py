"""From a prompt to the embeddings that the transformer takes: clean, tokenise, encode, pad.

The steps of the official pipeline (spec 3.2). The encoder runs on 512 tokens with a mask, its
result is cut to the prompt's own tokens, and zero rows fill it up again for the transformer.

The tokenizer is read from ``tokenizer.json`` as it stands. The T5 class of transformers 5 would
rebuild it from the vocabulary and lose umT5's byte fallback for rare characters.
"""

import html
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from threading import Lock

import ftfy
import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from wan22_jax.errors import BadInput
from wan22_jax.model.umt5 import UMT5
from wan22_jax.model.umt5_streamed import StreamedUMT5
from wan22_jax.spread import spread

TEXT_LEN = 512  # tokens of a prompt, padding included (official config, text_len)
PAD, PAD_ID = "<pad>", 0  # umT5's special tokens
END, END_ID = "</s>", 1


def clean_prompt(text: str) -> str:
    """Mends encoding faults and HTML entities, and makes every run of white space one space.

    Curly quotes become straight and full-width forms narrow: a Chinese comma becomes ASCII.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def load_tokenizer(folder: Path) -> Tokenizer:
    """Opens the ``tokenizer.json`` of an official, Diffusers or converted model's tokenizer folder.

    Raises:
        BadInput: the file is missing, damaged, or not a T5 tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(
            f"{path}: not found; point to the tokenizer folder of the model "
            "(google/umt5-xxl in the official release, tokenizer in the Diffusers one)"
        )
    tokenizer = Tokenizer.from_str(_read_tokenizer(path))
    tokenizer.enable_truncation(TEXT_LEN)
    tokenizer.enable_padding(length=TEXT_LEN, pad_id=PAD_ID, pad_token=PAD)
    empty = tokenizer.encode("").tokens[:2]
    if empty != [END, PAD] or tokenizer.token_to_id(END) != END_ID:
        raise BadInput(
            f"{path}: expected umT5's tokenizer, which turns an empty text into {END} = {END_ID}; "
            f"this one gives {empty}; copy the tokenizer folder of the Wan2.2 model"
        )
    return tokenizer


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str]
) -> tuple[Int[np.ndarray, "B 512"], Bool[np.ndarray, "B 512"]]:
    """Cleans prompts and turns them into token ids (int32) and a mask that is true at real tokens.

    Every prompt ends in ``</s>``, also one that was cut at 512 tokens; the rest is padding, id 0.
    """
    # One by one: encode_batch starts threads, which processes forked later complain about.
    encodings = [tokenizer.encode(clean_prompt(prompt)) for prompt in prompts]
    shape = (len(encodings), TEXT_LEN)
    tokens_BS = np.array([encoding.ids for encoding in encodings], np.int32).reshape(shape)
    mask_BS = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(shape)
    return tokens_BS, mask_BS


def is_cut(tokenizer: Tokenizer, prompt: str) -> bool:
    """Whether a prompt has more than 512 tokens, of which the encoder sees the first."""
    return bool(tokenizer.encode(clean_prompt(prompt)).overflowing)


def encode_text(
    encoder: UMT5 | StreamedUMT5, tokenizer: Tokenizer, prompts: Sequence[str]
) -> list[np.ndarray]:
    """Returns an embedding ``text_SE`` for each prompt, as many rows as it has tokens (1 to 512).

    All prompts run as one batch, in the encoder's dtype; each batch size compiles once.

    Raises:
        BadInput: the tokenizer knows tokens that the encoder does not.
    """
    if not prompts:
        return []
    tokens_BS, mask_BS = tokenize(tokenizer, prompts)
    vocab_size = encoder.config.vocab_size
    if tokens_BS.max() >= vocab_size:
        raise BadInput(
            f"text encoder: token {tokens_BS.max()} is outside of its vocabulary of {vocab_size}; "
            "use the tokenizer and the text encoder of one model"
        )
    text_BSE = run_encoder(encoder, tokens_BS, mask_BS)
    return [text_SE[mask_S] for text_SE, mask_S in zip(text_BSE, mask_BS, strict=True)]


def encode_each(
    encoders: Sequence[UMT5 | StreamedUMT5],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    at_once: int,
) -> Generator[np.ndarray, None, None]:
    """Yields the embedding of each text, in order, as ``encode_text``, so many in a batch.

    The last batch is filled up with empty texts: each batch size compiles once, on one device after
    the other (``clip_encoder.py`` says why).

    Args:
        encoders: copies of one text encoder, each on a device of its own.
        tokenizer: that of the encoder.
        texts: as they are written.
        at_once: texts in a batch.
    """
    batches = (texts[start : start + at_once] for start in range(0, len(texts), at_once))
    run = partial(_encode_on_one, tokenizer=tokenizer, at_once=at_once, compiling=Lock())
    with closing(spread(run, encoders, batches)) as encoded:
        for embeddings in encoded:
            yield from embeddings


def _encode_on_one(
    encoder: UMT5 | StreamedUMT5,
    batches: Iterable[Sequence[str]],
    *,
    tokenizer: Tokenizer,
    at_once: int,
    compiling: AbstractContextManager,
) -> Iterator[list[np.ndarray]]:
    for number, batch in enumerate(batches):
        filled = [*batch, *[""] * (at_once - len(batch))]
        with nullcontext() if number else compiling:
            embeddings = encode_text(encoder, tokenizer, filled)
        yield embeddings[: len(batch)]


def run_encoder(
    encoder: UMT5 | StreamedUMT5,
    tokens_BS: Int[np.ndarray, "B S"],
    mask_BS: Bool[np.ndarray, "B S"],
) -> np.ndarray:
    """Runs a batch as one program, or as one a layer if the layers are streamed; fetches it."""
    if isinstance(encoder, StreamedUMT5):
        return np.asarray(encoder(tokens_BS, mask_BS))
    return np.asarray(_run_encoder(*nnx.split(encoder), tokens_BS, mask_BS))


def pad_text(texts_SE: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks embeddings into ``text_BSE`` [B, 512, E] of their dtype; zero rows fill each up.

    Raises:
        ValueError: the sequence is empty or an embedding is longer than 512.
    """
    num_rows = max(len(text_SE) for text_SE in texts_SE)
    if num_rows > TEXT_LEN:
        raise ValueError(f"text of {num_rows} tokens: at most {TEXT_LEN} expected")
    first_SE = texts_SE[0]
    text_BSE = np.zeros((len(texts_SE), TEXT_LEN, first_SE.shape[1]), first_SE.dtype)
    for row_SE, text_SE in zip(text_BSE, texts_SE, strict=True):
        row_SE[: len(text_SE)] = text_SE
    return text_BSE


def _read_tokenizer(path: Path) -> str:
    # Tokenizer.from_str reports a bad file with a bare Exception, so look before it does.
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except ValueError as error:
        raise BadInput(
            f"{path}: expected a JSON file, found {error}; copy it from the model again"
        ) from error
    if not isinstance(content, dict) or "model" not in content:
        raise BadInput(
            f'{path}: expected a tokenizer with an entry "model"; copy it from the model again'
        )
    return text


@jax.jit(static_argnums=0)
def _run_encoder(
    graphdef: nnx.GraphDef, state: nnx.State, tokens_BS: jax.Array, mask_BS: jax.Array
) -> jax.Array:
    return nnx.merge(graphdef, state)(tokens_BS, mask_BS)
