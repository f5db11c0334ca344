"""What the encoders of wan22-cache compute in, and where their weights are."""

import dataclasses

import cache_place
import numpy as np
import pytest

from wan22_jax import encode, text
from wan22_jax.data.cache import name_encoders
from wan22_jax.dataset import open_caches
from wan22_jax.model.umt5 import UMT5, UMT5_XXL
from wan22_jax.model.umt5_streamed import StreamedUMT5
from wan22_jax.model_folder import fits, read_model_card
from wan22_jax.text import encode_text

models, place, counted = cache_place.models, cache_place.place, cache_place.counted  # fixtures


@pytest.mark.long
def test_the_vae_runs_in_bfloat16_unless_told_otherwise(place, counted, capsys):
    place.fill()
    assert place.run() == 0
    exact = {file: record.latents_TYXC for file, (_, record) in place.stored().items()}
    bfloat16 = "model.vae_dtype=bfloat16"
    assert place.run(bfloat16) == 2  # no cache mixes latents of both
    assert "use the model and vae_dtype that made it" in capsys.readouterr().err
    assert place.run("--show-batch=1", bfloat16) == 2
    assert place.run("--verify", bfloat16) == 2
    assert place.run("--regenerate_cache", bfloat16) == 0
    assert place.run() == 2
    config = place.config.read_text().replace("vae_dtype = 'float32'\n", "")
    place.config.write_text(config)
    for arguments in ([], ["--show-batch=1"], ["--verify"]):
        assert place.run(*arguments) == 0
    assert (counted.captions, counted.clips) == (6, 6)
    digests = read_model_card(place.model).digests
    caches = open_caches(place.dataset, encoders=name_encoders(digests, vae_dtype="bfloat16"))
    ((cache, _),) = caches
    for number, clip in enumerate(cache.clips):
        exact_TYXC = exact[clip.file].astype(np.float32)
        error_TYXC = cache.read(number).latents_TYXC.astype(np.float32) - exact_TYXC
        # Up to 1.2 % in this model, which makes the signal small beside its rounding.
        assert 1e-4 < np.sqrt(np.mean(error_TYXC**2) / np.mean(exact_TYXC**2)) < 0.02
    assert place.run("model.dtype=float32") == 0  # that of the transformer is another matter


def test_a_text_encoder_that_does_not_fit_is_streamed_to_the_same_bits(place, monkeypatch):
    place.fill()
    used = []

    def spy(encoder, *args):
        used.append(type(encoder))
        return encode_text(encoder, *args)

    monkeypatch.setattr(text, "encode_text", spy)
    texts = []
    for memory_bytes in (4 * 10**9, 10**9):  # a CPU has no limit of its own
        monkeypatch.setattr(encode, "device_memory", lambda limit=memory_bytes: limit)
        assert place.run("--regenerate_cache") == 0
        texts.append({file: record.text_SE for file, (_, record) in place.stored().items()})
    assert used == [UMT5, StreamedUMT5]
    for file, text_SE in texts[0].items():
        np.testing.assert_array_equal(texts[1][file], text_SE)


def test_the_xxl_encoder_fits_into_16_gb(place):
    card = read_model_card(place.model)
    card = dataclasses.replace(card, text_encoder=UMT5_XXL, dtype="bfloat16")
    assert [fits(card, gb * 10**9) for gb in (10, 14, 15, 24)] == [False, False, True, True]
