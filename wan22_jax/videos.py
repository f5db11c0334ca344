"""One video from a request to its frames: the steps that wan22-sample and previews share.

They are apart since only one network is in device memory at a time: whoever makes videos makes
the same part of all of them before the next network is loaded.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan22_jax.geometry import Bucket
from wan22_jax.model.vae import WanVAE
from wan22_jax.model_folder import load_fitting_text_encoder, tokenizer_folder
from wan22_jax.prompts import Request
from wan22_jax.sampling import NEGATIVE_PROMPT, Velocity, sample_latents
from wan22_jax.sharding import device_memory
from wan22_jax.text import TEXT_LEN, encode_each, is_cut, load_tokenizer, pad_text

log = logging.getLogger(__name__)
_TEXTS_AT_ONCE = 8


class Video(NamedTuple):
    """One video to make: what is asked for, where it goes, and what follows from it."""

    request: Request
    path: Path
    bucket: Bucket
    frame_BTYX3: np.ndarray | None  # the first frame in pixels, if it is given

    @property
    def negative(self) -> str | None:
        """What to move away from, None without guidance."""
        return None if self.request.guidance == 1 else self.request.negative or NEGATIVE_PROMPT


def encode_texts(videos: Sequence[Video], folder: Path, *, dtype: str) -> dict[str, np.ndarray]:
    """Returns the padded embeddings [1, S, E] of all prompts, by their text.

    Args:
        videos: to be made.
        folder: of the model.
        dtype: of the text encoder.
    """
    texts = [text for video in videos for text in (video.request.prompt, video.negative) if text]
    wanted = list(dict.fromkeys(texts))
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    encoder = load_fitting_text_encoder(folder, dtype=dtype, memory_bytes=device_memory())
    for text in wanted:
        if is_cut(tokenizer, text):
            log.warning("a prompt is cut at %d tokens: %.60s...", TEXT_LEN, text)
    at_once = min(_TEXTS_AT_ONCE, len(wanted))
    embeddings = encode_each([encoder], tokenizer, wanted, at_once=at_once)
    return {text: pad_text([text_SE]) for text, text_SE in zip(wanted, embeddings, strict=True)}


def encode_frame(vae: WanVAE, video: Video) -> np.ndarray | None:
    """Returns the latents [1, 1, Y, X, C] of the first frame, None where none is given."""
    if video.frame_BTYX3 is None:
        return None
    return np.asarray(next(vae.encode_chunks([video.frame_BTYX3])))


def denoise(
    velocity: Velocity,
    video: Video,
    texts: Mapping[str, np.ndarray],
    first_frame: np.ndarray | None,
    *,
    channels: int,
    on_step: Callable[[], object],
    paired: bool = False,
) -> np.ndarray:
    """Returns the clean latents [1, T, Y, X, C], on the host; noise follows from the seed alone.

    Args:
        velocity: the model's.
        video: to be made.
        texts: from ``encode_texts``.
        first_frame: from ``encode_frame``.
        channels: of the latents.
        on_step: see ``sample_latents``.
        paired: see there.
    """
    request = video.request
    latents_BTYXC = sample_latents(
        velocity,
        texts[request.prompt],
        None if video.negative is None else texts[video.negative],
        shape=(1, *video.bucket.latent_TYX, channels),
        solver=request.solver,
        steps=request.steps,
        shift=request.shift,
        guidance=request.guidance,
        key=jax.random.key(request.seed),
        first_frame=first_frame,
        on_step=on_step,
        paired=paired,
    )
    return np.asarray(latents_BTYXC)


def fetch_video(chunks: Iterable[jax.Array | np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the bytes [T, Y, X, 3] of decoded chunks of one clip, clamped to [-1, 1].

    They are cut, not rounded, as the original does. The next chunk is under way when one is here.
    """
    ahead = None
    for video_BTYX3 in chunks:
        here, ahead = ahead, _quantise(video_BTYX3)
        if here is not None:
            yield np.asarray(here[0])
    if ahead is not None:
        yield np.asarray(ahead[0])


def describe_request(video: Video) -> dict[str, Any]:
    """Says in JSON's types what a video was made from, for the file's metadata."""
    said: dict[str, Any] = asdict(video.request)
    said |= {"width": video.bucket.width_px, "height": video.bucket.height_px}
    said |= {"negative": video.negative or ""}
    return said | {"image": None if video.request.image is None else str(video.request.image)}


@jax.jit
def _quantise(video_BTYX3: jax.Array | np.ndarray) -> jax.Array:
    unit_BTYX3 = (jnp.clip(video_BTYX3, -1, 1) + 1) / 2
    return (unit_BTYX3 * 255).astype(jnp.uint8)
