"""Encoding clips: chunks, order, what is under way when, and what an error costs."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_vae import LATENTS_MEAN, LATENTS_STD, SIZES, draw_weights

from wan22_jax import clip_encoder
from wan22_jax.clip_encoder import (
    choose_chunk,
    count_frame_bytes,
    decode_ahead,
    encode_clips,
    encode_pixels,
)
from wan22_jax.geometry import Bucket
from wan22_jax.model import vae as vae_file
from wan22_jax.model.vae import VAEConfig, WanVAE
from wan22_jax.weights import set_parameters, stacked_shapes

CONFIG = VAEConfig(**SIZES, latents_mean=LATENTS_MEAN, latents_std=LATENTS_STD)


@pytest.fixture(scope="module")
def vae():
    """Its weights keep the size of activations, as those of a trained model do."""
    vae = nnx.eval_shape(lambda: WanVAE(CONFIG, rngs=nnx.Rngs(0)))
    weights = draw_weights(dict(stacked_shapes(vae)))
    set_parameters(vae, {name: jnp.asarray(weight) for name, weight in weights.items()})
    return vae


@pytest.mark.parametrize(
    ("bucket", "itemsize", "length"),
    [
        ((1280, 704, 121), 2, 8),
        ((1280, 704, 121), 4, 4),
        ((832, 480, 81), 2, 16),
        ((832, 480, 81), 4, 8),
        ((512, 512, 33), 2, 16),
        ((512, 512, 125), 2, 4),  # 31 latent frames after the first are a prime number
        ((1920, 1088, 121), 2, 4),
        ((1280, 704, 1), 2, 4),
    ],
)
def test_chunks_are_even_and_within_the_budget(bucket, itemsize, length):
    bucket = Bucket(*bucket)
    frame_pixels = bucket.width_px * bucket.height_px
    assert choose_chunk(bucket.frames, frame_pixels=frame_pixels, itemsize=itemsize) == length
    assert (bucket.frames - 1) % length == 0


def test_a_bucket_has_two_programs_and_takes_bytes(vae, monkeypatch):
    monkeypatch.setattr(clip_encoder, "CHUNK_PIXELS", 16 * 32 * 32)  # 8 frames in float32
    pixels_TYX3 = _draw(17)
    vae_file._encode_chunk.clear_cache()
    got_TYXC = encode_pixels(vae, pixels_TYX3)
    assert vae_file._encode_chunk._cache_size() == 2
    assert got_TYXC.dtype == np.float32
    scaled_1TYX3 = pixels_TYX3[None].astype(np.float32) / 127.5 - 1
    (whole_1TYXC,) = vae.encode_chunks([scaled_1TYX3])
    np.testing.assert_allclose(got_TYXC, whole_1TYXC[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_latents_are_within_a_percent_of_float32(vae):
    """RMS, relative; 0.7 to 0.8 % was measured with four clips."""
    graphdef, state = nnx.split(vae)
    narrow = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    pixels_TYX3 = _draw(9)
    exact_TYXC, got_TYXC = encode_pixels(vae, pixels_TYX3), encode_pixels(narrow, pixels_TYX3)
    assert got_TYXC.dtype == np.float32
    error = np.sqrt(np.mean((got_TYXC - exact_TYXC) ** 2) / np.mean(exact_TYXC**2))
    assert 1e-4 < error < 0.01


def test_norm_statistics_and_softmax_stay_float32(vae):
    graphdef, state = nnx.split(vae)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    frames = jnp.zeros((1, 1, 32, 32, 3), jnp.uint8)
    jaxpr = jax.make_jaxpr(lambda s, x: vae_file._encode_chunk(graphdef, s, None, x))(
        narrow, frames
    )
    lines = str(jaxpr).splitlines()
    convolutions = [line for line in lines if "= conv_general_dilated[" in line]
    assert convolutions
    assert all(":bf16[" in line for line in convolutions)
    reductions = [line for line in lines if "= reduce_sum[" in line or " exp " in line]
    assert reductions
    assert all(":f32[" in line for line in reductions)


def test_a_clip_is_under_way_before_the_one_before_is_fetched(vae, monkeypatch):
    starts = []
    start, fetch = clip_encoder.start_encoding, clip_encoder.fetch_latents
    counts = []

    def fetch_(latents):
        counts.append(len(starts))
        return fetch(latents)

    monkeypatch.setattr(
        clip_encoder, "start_encoding", lambda *args: [starts.append(1), start(*args)][1]
    )
    monkeypatch.setattr(clip_encoder, "fetch_latents", fetch_)
    clips = [(name, _draw(5, seed)) for seed, name in enumerate("abc")]
    got = dict(encode_clips([vae], clips))
    assert counts == [2, 3, 3]
    assert list(got) == ["a", "b", "c"]
    for name, pixels_TYX3 in clips:
        np.testing.assert_array_equal(got[name], encode_pixels(vae, pixels_TYX3))


def test_an_error_comes_after_the_clips_before_it(vae):
    def clips():
        yield "a", _draw(5)
        yield "b", _draw(5)
        raise KeyboardInterrupt

    done = encode_clips([vae], clips())
    assert [next(done)[0], next(done)[0]] == ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        next(done)


def test_decoding_runs_ahead_within_its_budget(monkeypatch):
    monkeypatch.setattr(clip_encoder, "DECODED_BYTES", 40)
    lock, live, most = threading.Lock(), 0, 0

    def decode(item):
        nonlocal live, most
        with lock:
            live += 10
            most = max(most, live)
        return np.full(10, item, np.uint8)

    numbers = []
    for item, array in decode_ahead(range(50), decode, count_bytes=lambda _: 10):
        numbers.append(item)
        assert set(array) == {item}
        with lock:
            live -= 10
    assert numbers == list(range(50))
    assert 10 < most <= 50  # the one in hand and 40 bytes that wait


def test_a_clip_larger_than_the_budget_is_decoded_alone(monkeypatch):
    monkeypatch.setattr(clip_encoder, "DECODED_BYTES", 5)
    pairs = decode_ahead(range(3), lambda item: np.full(10, item), count_bytes=lambda _: 10)
    assert [item for item, _ in pairs] == [0, 1, 2]


def test_an_error_in_decoding_comes_in_its_turn():
    def decode(item):
        if item == 1:
            raise ValueError("broken")
        return np.zeros(1)

    pairs = decode_ahead(range(3), decode, count_bytes=lambda _: 1)
    assert next(pairs)[0] == 0
    with pytest.raises(ValueError, match="broken"):
        next(pairs)


def test_frame_bytes():
    assert count_frame_bytes(Bucket(1280, 704, 121)) == 121 * 704 * 1280 * 3


def _draw(frames, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)
