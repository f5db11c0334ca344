"""How the clips of a data set go through the VAE without it ever waiting.

Threads decode ahead, within a budget of memory. Frames go to the device as bytes and become numbers
there. A clip is on its way before the latents of the one before it are waited for, so that frames
are copied, records written and the next clips decoded while the device computes.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Float, UInt8

from wan22_jax.geometry import TIME_STRIDE, Bucket
from wan22_jax.model.vae import WanVAE

# Pixels of a chunk in bfloat16: 8 frames of 1280x704. Its program takes 5.9 GB on an H100, weights
# and history included (XLA's count, without cuDNN's scratch). That of 12 frames takes 7.7 GB, and 4
# frames would copy the history, 1 GB, twice as often.
CHUNK_PIXELS = 8 * 1280 * 704
DECODED_BYTES = 2 * 10**9  # of frames that wait for the VAE, unless one clip has more
MOST_AHEAD = 64  # clips, however small
DECODERS = 8  # at most: each resizes one frame at a time, decoding has threads of its own

ItemT = TypeVar("ItemT")


def encode_pixels(
    vae: WanVAE, pixels_TYX3: UInt8[np.ndarray, "T Y X 3"]
) -> Float[np.ndarray, "t y x C"]:
    """Encodes the 4n + 1 frames of one clip; returns float32 latents."""
    return fetch_latents(start_encoding(vae, pixels_TYX3))


def start_encoding(vae: WanVAE, pixels_TYX3: UInt8[np.ndarray, "T Y X 3"]) -> list[jax.Array]:
    """Sends the 4n + 1 frames of one clip on their way; returns the latents of its chunks."""
    frames, rows, columns, _ = pixels_TYX3.shape
    itemsize = vae.conv1.weight.dtype.itemsize
    length = choose_chunk(frames, frame_pixels=rows * columns, itemsize=itemsize)
    starts = range(1, frames, length)
    chunks = [pixels_TYX3[:1], *(pixels_TYX3[i : i + length] for i in starts)]
    latents = []
    for latents_1TYXC in vae.encode_chunks(chunk[None] for chunk in chunks):
        latents_1TYXC.copy_to_host_async()
        latents.append(latents_1TYXC)
    return latents


def fetch_latents(latents: Sequence[jax.Array]) -> Float[np.ndarray, "t y x C"]:
    """Waits for what ``start_encoding`` has started."""
    return np.concatenate([np.asarray(latents_1TYXC)[0] for latents_1TYXC in latents])


def choose_chunk(frames: int, *, frame_pixels: int, itemsize: int) -> int:
    """Returns how many frames the chunks after the first one have.

    A multiple of 4 that divides the frames after the first, so that a bucket has two programs.

    Args:
        frames: of the clip, 4n + 1.
        frame_pixels: of one frame.
        itemsize: bytes of a number in the VAE.
    """
    limit = max(1, CHUNK_PIXELS * 2 // itemsize // frame_pixels // TIME_STRIDE)
    num_later = (frames - 1) // TIME_STRIDE
    divisors = [n for n in range(1, min(limit, num_later) + 1) if num_later % n == 0]
    return TIME_STRIDE * max(divisors, default=1)


def encode_clips(
    vae: WanVAE, clips: Iterable[tuple[ItemT, UInt8[np.ndarray, "T Y X 3"]]]
) -> Iterator[tuple[ItemT, Float[np.ndarray, "t y x C"]]]:
    """Yields the latents of each clip, in order; the next clip is on its way by then.

    What ``clips`` raises, a keyboard interrupt too, comes after the latents of the clips before.
    """
    source = iter(clips)
    under_way: tuple[ItemT, list[jax.Array]] | None = None
    while True:
        error = next_one = None
        try:
            item, pixels_TYX3 = next(source)
            next_one = (item, start_encoding(vae, pixels_TYX3))
        except StopIteration:
            pass
        except BaseException as caught:
            error = caught
        if under_way is not None:
            yield under_way[0], fetch_latents(under_way[1])
        if error is not None:
            raise error
        if next_one is None:
            return
        under_way = next_one


def decode_ahead(
    items: Sequence[ItemT],
    decode: Callable[[ItemT], np.ndarray],
    *,
    count_bytes: Callable[[ItemT], int],
) -> Iterator[tuple[ItemT, np.ndarray]]:
    """Decodes in threads, in order, at most ``DECODED_BYTES`` ahead.

    What ``decode`` raises comes in its turn, after the clips before.

    Args:
        items: what to decode.
        decode: one of them.
        count_bytes: that it will decode to.
    """
    num_threads = min(DECODERS, os.cpu_count() or 1)
    waiting: deque[tuple[ItemT, int, Future[np.ndarray]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                size = count_bytes(item)
                while waiting and (ahead + size > DECODED_BYTES or len(waiting) == MOST_AHEAD):
                    done, done_size, decoded = waiting.popleft()
                    ahead -= done_size
                    yield done, decoded.result()
                waiting.append((item, size, pool.submit(decode, item)))
                ahead += size
            while waiting:
                done, _, decoded = waiting.popleft()
                yield done, decoded.result()
        finally:
            pool.shutdown(cancel_futures=True)


def count_frame_bytes(bucket: Bucket) -> int:
    """Returns the bytes of a clip's frames as they are decoded."""
    return bucket.frames * bucket.height_px * bucket.width_px * 3
