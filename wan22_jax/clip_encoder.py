"""How the clips of a data set go through the VAE without it, or any copy of it, ever waiting.

Threads decode ahead, within a budget of memory. Frames go to the device as bytes and become numbers
there. A clip is on its way before the latents of the one before it are waited for, so that frames
are copied, records written and the next clips decoded while the device computes.

Of several devices each has a copy of the VAE and clips of its own. All run one program, that of one
clip, so that the latents are the same bits however many there are; a program over a mesh would be
another one for each number of devices, and they would wait for each other in every chunk. JAX
traces and lowers the program once but compiles it for each device, half a minute. So one device at
a time meets a new shape: on a GPU the others then read the program from the compilation cache,
whose keys leave out the number of the GPU.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Float, UInt8

from wan22_jax.geometry import TIME_STRIDE, Bucket
from wan22_jax.model.vae import WanVAE
from wan22_jax.spread import spread

# Pixels of a chunk in bfloat16: 8 frames of 1280x704. Its program takes 5.9 GB on an H100, weights
# and history included (XLA's count, without cuDNN's scratch). That of 12 frames takes 7.7 GB, and 4
# frames would copy the history, 1 GB, twice as often.
CHUNK_PIXELS = 8 * 1280 * 704
# For each device:
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
    """Sends the 4n + 1 frames of one clip on their way; returns the latents of its chunks.

    They go to the device that the VAE is on.
    """
    frames, rows, columns, _ = pixels_TYX3.shape
    weight = vae.conv1.weight[...]
    itemsize = weight.dtype.itemsize
    length = choose_chunk(frames, frame_pixels=rows * columns, itemsize=itemsize)
    starts = range(1, frames, length)
    chunks = [pixels_TYX3[:1], *(pixels_TYX3[i : i + length] for i in starts)]
    latents = []
    placed = (jax.device_put(chunk[None], weight.sharding) for chunk in chunks)
    for latents_1TYXC in vae.encode_chunks(placed):
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
    vaes: Sequence[WanVAE], clips: Iterable[tuple[ItemT, UInt8[np.ndarray, "T Y X 3"]]]
) -> Generator[tuple[ItemT, Float[np.ndarray, "t y x C"]], None, None]:
    """Yields the latents of each clip, in order; the next clips are on their way by then.

    What ``clips`` raises, a keyboard interrupt too, comes after the latents of the clips before.

    Args:
        vaes: copies of one VAE, each on a device of its own.
        clips: whatever tells them apart, and their 4n + 1 frames.
    """
    return spread(partial(_encode_on_one, compiling=threading.Lock()), vaes, clips)


def _encode_on_one(
    vae: WanVAE,
    clips: Iterable[tuple[ItemT, np.ndarray]],
    *,
    compiling: AbstractContextManager,
) -> Iterator[tuple[ItemT, np.ndarray]]:
    source = iter(clips)
    met: set[tuple[int, ...]] = set()  # shapes
    under_way: tuple[ItemT, list[jax.Array]] | None = None
    while True:
        error = next_one = None
        try:
            item, pixels_TYX3 = next(source)
            with nullcontext() if pixels_TYX3.shape in met else compiling:
                next_one = (item, start_encoding(vae, pixels_TYX3))
            met.add(pixels_TYX3.shape)
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
    num_devices: int = 1,
) -> Iterator[tuple[ItemT, np.ndarray]]:
    """Decodes in threads, in order, at most ``DECODED_BYTES`` ahead for each device.

    What ``decode`` raises comes in its turn, after the clips before.

    Args:
        items: what to decode.
        decode: one of them.
        count_bytes: that it will decode to.
        num_devices: that take what is decoded.
    """
    num_threads = min(DECODERS * num_devices, os.cpu_count() or 1)
    most_bytes, most_clips = DECODED_BYTES * num_devices, MOST_AHEAD * num_devices
    waiting: deque[tuple[ItemT, int, Future[np.ndarray]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                size = count_bytes(item)
                while waiting and (ahead + size > most_bytes or len(waiting) == most_clips):
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
