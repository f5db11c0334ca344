"""How is a video decoded on a card that cannot hold a whole frame of it? Tile by tile.

Approximate: a tile does not see what is beside it, neither at its edges nor in the attention of
the decoder's middle, which spans a frame. Tiles overlap, and where they do they are blended.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Array, Float

from wan22_jax.geometry import SPACE_STRIDE

Decode = Callable[[np.ndarray], Iterable[Array | np.ndarray]]

OVERLAP = 4  # a tile shares so manieth of its side with the next one


def decode_tiles(
    decode_chunks: Decode, latents_BTYXC: Float[Array | np.ndarray, "B T Y X C"], *, tile_px: int
) -> Iterator[np.ndarray]:
    """Yields the video of one latent frame after the other, as ``WanVAE.decode_chunks`` does.

    Device memory is that of a tile, and the whole video waits in host memory as float32: each tile
    is decoded from beginning to end before the next one. One tile is ``decode_chunks`` itself.

    Args:
        decode_chunks: of a ``WanVAE``.
        latents_BTYXC: normalised latents.
        tile_px: rows and columns of a tile in pixels, a multiple of 16; at least 64.

    Raises:
        ValueError: the size of a tile is not such a number.
    """
    if tile_px < 4 * SPACE_STRIDE or tile_px % SPACE_STRIDE:
        raise ValueError(f"tile of {tile_px} pixels: a multiple of {SPACE_STRIDE} from 64 expected")
    latents_BTYXC = np.asarray(latents_BTYXC, np.float32)
    spans = [_cut(length, tile_px // SPACE_STRIDE) for length in latents_BTYXC.shape[2:4]]
    sums: list[np.ndarray] = []
    weight_YX = np.zeros([SPACE_STRIDE * length for length in latents_BTYXC.shape[2:4]], np.float32)
    for rows in spans[0]:
        for columns in spans[1]:
            tile_BTYXC = latents_BTYXC[:, :, rows, columns]
            ramp_YX = np.outer(
                *(_ramp(span, spans[axis]) for axis, span in enumerate((rows, columns)))
            )
            place = _in_pixels(rows), _in_pixels(columns)
            weight_YX[place] += ramp_YX
            for number, chunk_BTYX3 in enumerate(decode_chunks(tile_BTYXC)):
                if number == len(sums):
                    shape = (*chunk_BTYX3.shape[:2], *weight_YX.shape, 3)
                    sums.append(np.zeros(shape, np.float32))
                sums[number][:, :, *place] += np.asarray(chunk_BTYX3) * ramp_YX[..., None]
    for sum_BTYX3 in sums:
        yield sum_BTYX3 / weight_YX[..., None]


def _cut(length: int, tile: int) -> list[slice]:
    """Cuts a side into as few spans of one length as overlap enough."""
    tile = min(tile, length)
    overlap = tile // OVERLAP
    count = 1 if tile == length else math.ceil((length - overlap) / (tile - overlap))
    starts = np.linspace(0, length - tile, count).round().astype(int)
    return [slice(int(start), int(start) + tile) for start in starts]


def _ramp(span: slice, spans: list[slice]) -> np.ndarray:
    """What a tile counts at each pixel of one side: less towards an edge that another covers."""
    width = _in_pixels(span).stop - _in_pixels(span).start
    ramp = np.ones(width, np.float32)
    fade = (np.arange(width // OVERLAP, dtype=np.float32) + 0.5) / (width // OVERLAP)
    if span != spans[0]:
        ramp[: len(fade)] *= fade
    if span != spans[-1]:
        ramp[len(ramp) - len(fade) :] *= fade[::-1]
    return ramp


def _in_pixels(span: slice) -> slice:
    return slice(span.start * SPACE_STRIDE, span.stop * SPACE_STRIDE)
