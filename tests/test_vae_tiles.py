"""Decoding tile by tile: where tiles lie, how they blend, and that one is the whole."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from wan22_jax.geometry import SPACE_STRIDE
from wan22_jax.model import vae_tiles
from wan22_jax.model.vae_tiles import decode_tiles


def decode_pixels(latents_BTYXC):
    """Decodes as a VAE would that sees nothing but a pixel's own latent."""
    for number in range(latents_BTYXC.shape[1]):
        frame = latents_BTYXC[:, number : number + 1, ..., :3]
        video = frame.repeat(SPACE_STRIDE, 2).repeat(SPACE_STRIDE, 3)
        yield jnp.asarray(video.repeat(4 if number else 1, 1))


@pytest.mark.parametrize(("rows", "columns", "tile_px"), [(5, 9, 64), (11, 4, 96), (3, 3, 64)])
def test_blending_changes_nothing_that_tiles_agree_on(rows, columns, tile_px):
    latents = np.random.default_rng(0).normal(size=(2, 2, rows, columns, 4)).astype(np.float32)
    chunks = list(decode_tiles(decode_pixels, latents, tile_px=tile_px))
    assert [chunk.shape[1] for chunk in chunks] == [1, 4]
    for chunk, wanted in zip(chunks, decode_pixels(latents), strict=True):
        np.testing.assert_allclose(chunk, wanted, atol=1e-5)


@pytest.mark.parametrize("length", [4, 5, 7, 22, 40])
def test_tiles_cover_a_side_and_overlap(length):
    spans = vae_tiles._cut(length, 4)
    assert {span.stop - span.start for span in spans} == {4}
    assert (spans[0].start, spans[-1].stop) == (0, length)
    assert all(before.stop > after.start for before, after in itertools.pairwise(spans))


def test_one_tile_is_the_whole():
    latents = np.random.default_rng(0).normal(size=(1, 2, 4, 6, 4)).astype(np.float32)
    chunks = decode_tiles(decode_pixels, latents, tile_px=96)
    for chunk, wanted in zip(chunks, decode_pixels(latents), strict=True):
        np.testing.assert_array_equal(chunk, wanted)


@pytest.mark.parametrize("tile_px", [0, 48, 100, -64])
def test_a_tile_has_a_size_that_latents_have(tile_px):
    with pytest.raises(ValueError, match=f"tile of {tile_px} pixels"):
        next(decode_tiles(decode_pixels, np.zeros((1, 1, 4, 4, 4), np.float32), tile_px=tile_px))
