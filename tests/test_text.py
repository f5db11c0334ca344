"""Prompt cleaning, the tokenizer, and embeddings cut to a prompt's own tokens."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, processors

from wan22_jax import text
from wan22_jax.demo_checkpoint import write_tokenizer
from wan22_jax.errors import BadInput
from wan22_jax.model import umt5_streamed
from wan22_jax.model.umt5 import UMT5, UMT5Config
from wan22_jax.model.umt5_streamed import StreamedUMT5
from wan22_jax.text import clean_prompt, encode_text, load_tokenizer, pad_text, tokenize

CORPUS = ("a red square moves left", "a blue circle moves right, fast", 'It\'s "green" & round')
PROMPTS = ("a red square", "", "a blue circle moves right, fast")
# The start of the default negative prompt (Wan2.2, wan/configs/shared_config.py).
NEGATIVE = "色调艳丽，过曝，静态，细节模糊不清"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tokenizer"
    write_tokenizer(folder, CORPUS, vocab_size=256)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def make_encoder(dtype=jnp.float32, vocab_size: int = 256) -> UMT5:
    config = UMT5Config(vocab_size=vocab_size, dim=16, ffn_dim=24, num_heads=2, num_layers=2)
    encoder = UMT5(config, rngs=nnx.Rngs(3))
    nnx.update(encoder, nnx.map(lambda _, leaf: leaf.astype(dtype), nnx.state(encoder)))
    return encoder


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a cat", "a cat"),
        ("  two\t spaces\n\nand  lines ", "two spaces and lines"),
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("ＦＵＬＬ　ｗｉｄｔｈ！", "FULL width!"),
        (NEGATIVE, "色调艳丽,过曝,静态,细节模糊不清"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("a &amp;lt;b&amp;gt; c", "a <b> c"),
        ("&nbsp;non&#160;breaking&nbsp;", "non breaking"),
        ("schÃ¶n", "schön"),
        ("Case, and: Punctuation? Stay!", "Case, and: Punctuation? Stay!"),
        (" \n ", ""),
    ],
)
def test_clean_prompt(dirty, clean):
    assert clean_prompt(dirty) == clean
    assert clean_prompt(clean) == clean


def test_tokens_end_in_eos_and_are_padded_with_zero(tokenizer):
    tokens_BS, mask_BS = tokenize(tokenizer, PROMPTS)
    assert tokens_BS.shape == mask_BS.shape == (3, 512)
    assert tokens_BS.dtype == np.int32
    assert mask_BS.dtype == bool
    for prompt, tokens_S, mask_S in zip(PROMPTS, tokens_BS, mask_BS, strict=True):
        length = mask_S.sum()
        assert mask_S[:length].all()
        assert tokens_S[length - 1] == 1
        assert (tokens_S[: length - 1] > 1).all()
        assert (tokens_S[length:] == 0).all()
        assert tokenizer.decode(tokens_S[: length - 1]) == prompt
    assert mask_BS[1].sum() == 1  # the empty prompt is </s> alone


def test_prompts_are_cleaned_before_they_are_tokenised(tokenizer):
    tokens_BS, _ = tokenize(tokenizer, ["It’s  “green” &amp;amp; round\n", 'It\'s "green" & round'])
    np.testing.assert_array_equal(tokens_BS[0], tokens_BS[1])
    assert 2 not in tokens_BS  # <unk>: no character was left that the corpus has not


def test_a_long_prompt_is_cut_at_512_with_eos_last(tokenizer):
    tokens_BS, mask_BS = tokenize(tokenizer, ["a red square moves left " * 200])
    assert mask_BS.all()
    assert tokens_BS[0, -1] == 1
    assert (tokens_BS[0, :-1] > 1).all()


def test_padding_and_truncation_stored_in_the_file_do_not_count(folder, tmp_path):
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=8, direction="left")
    stored.save(str(tmp_path / "tokenizer.json"))
    got = tokenize(load_tokenizer(tmp_path), PROMPTS)
    for array, want in zip(got, tokenize(load_tokenizer(folder), PROMPTS), strict=True):
        np.testing.assert_array_equal(array, want)


def test_byte_fallback_of_the_file_survives(tmp_path):
    pieces = ["<pad>", "</s>", "<unk>", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2, byte_fallback=True)
    stored = Tokenizer(model)
    stored.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    stored.save(str(tmp_path / "tokenizer.json"))  # and no tokenizer_config.json
    tokens_BS, mask_BS = tokenize(load_tokenizer(tmp_path), ["a色"])
    utf8 = [4 + byte for byte in "色".encode()]
    assert tokens_BS[0][mask_BS[0]].tolist() == [3, *utf8, 1]


def test_a_release_tokenizer_class_changes_nothing(folder, tmp_path, tokenizer):
    # The released tokenizer_config.json names T5Tokenizer, which would rebuild the tokenizer.
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 300}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    np.testing.assert_array_equal(
        tokenize(load_tokenizer(tmp_path), PROMPTS)[0], tokenize(tokenizer, PROMPTS)[0]
    )


def test_tokens_equal_those_of_transformers(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    want = reference(list(PROMPTS), padding="max_length", truncation=True, max_length=512)
    tokens_BS, mask_BS = tokenize(tokenizer, PROMPTS)
    np.testing.assert_array_equal(tokens_BS, want["input_ids"])
    np.testing.assert_array_equal(mask_BS, want["attention_mask"])


def test_refuses_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(BadInput, match=r"tokenizer\.json: not found; point to the tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b'{"model": {"type": "Uni', b"\xff\xfe", b"[1]", b"{}"])
def test_refuses_a_damaged_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"tokenizer\.json: expected a .*copy it from the model"):
        load_tokenizer(tmp_path)


def test_refuses_the_tokenizer_of_another_model(folder, tmp_path):
    other = json.loads((folder / "tokenizer.json").read_text())
    other["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(BadInput, match=r"tokenizer\.json: expected umT5's tokenizer.*'<pad>'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_embeddings_have_as_many_rows_as_tokens_in_the_encoders_dtype(tokenizer, dtype):
    encoder = make_encoder(dtype)
    texts_SE = encode_text(encoder, tokenizer, PROMPTS)
    tokens_BS, mask_BS = tokenize(tokenizer, PROMPTS)
    whole_BSE = np.asarray(encoder(tokens_BS, mask_BS), np.float32)
    tolerance = 1e-5 if dtype is np.float32 else 0.05
    for text_SE, whole_SE, mask_S in zip(texts_SE, whole_BSE, mask_BS, strict=True):
        assert isinstance(text_SE, np.ndarray)
        assert text_SE.dtype == dtype
        assert text_SE.shape == (mask_S.sum(), 16)
        np.testing.assert_allclose(text_SE.astype(np.float32), whole_SE[mask_S], atol=tolerance)
    assert np.abs(texts_SE[0][0] - texts_SE[2][0]).max() > 0.1  # prompts do differ


def test_an_embedding_does_not_depend_on_its_batch(tokenizer):
    encoder = make_encoder()
    together = encode_text(encoder, tokenizer, PROMPTS)
    alone = encode_text(encoder, tokenizer, PROMPTS[2:])
    np.testing.assert_allclose(alone[0], together[2], rtol=0, atol=1e-5)
    assert encode_text(encoder, tokenizer, []) == []


def test_encoding_compiles_once_for_each_batch_size(tokenizer):
    encoder = make_encoder(vocab_size=300)  # a size of its own: nothing compiled for it yet
    before = text._run_encoder._cache_size()
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[:1], PROMPTS[1:2]):
        encode_text(encoder, tokenizer, prompts)
    assert text._run_encoder._cache_size() == before + 2


def test_refuses_tokens_that_the_encoder_does_not_know(tokenizer):
    with pytest.raises(BadInput, match="outside of its vocabulary of 8; use the tokenizer"):
        encode_text(make_encoder(vocab_size=8), tokenizer, PROMPTS)


def test_pad_text_fills_with_zero_rows():
    texts_SE = [np.full((length, 4), length, ml_dtypes.bfloat16) for length in (3, 1, 512)]
    text_BSE = pad_text(texts_SE)
    assert text_BSE.shape == (3, 512, 4)
    assert text_BSE.dtype == ml_dtypes.bfloat16
    for row_SE, text_SE in zip(text_BSE, texts_SE, strict=True):
        np.testing.assert_array_equal(row_SE[: len(text_SE)], text_SE)
        assert not row_SE[len(text_SE) :].any()


def test_pad_text_refuses_513_rows():
    with pytest.raises(ValueError, match="text of 513 tokens: at most 512"):
        pad_text([np.zeros((513, 4), np.float32)])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_streamed_encoder_gives_the_same_bits(tokenizer, dtype):
    encoder = make_encoder(dtype)
    whole = encode_text(encoder, tokenizer, PROMPTS)
    nnx.update(encoder, jax.tree.map(np.asarray, nnx.state(encoder)))
    streamed = StreamedUMT5(encoder)
    for layer in streamed._layers:
        for leaf in jax.tree.leaves(layer):
            assert leaf.sharding.memory_kind == "pinned_host"
    for got_SE, expected_SE in zip(encode_text(streamed, tokenizer, PROMPTS), whole, strict=True):
        assert got_SE.dtype == dtype
        np.testing.assert_array_equal(got_SE, expected_SE)


def test_a_streamed_encoder_has_few_layers_under_way(tokenizer, monkeypatch):
    config = UMT5Config(vocab_size=256, dim=16, ffn_dim=24, num_heads=2, num_layers=6)
    encoder = UMT5(config, rngs=nnx.Rngs(3))
    nnx.update(encoder, jax.tree.map(np.asarray, nnx.state(encoder)))
    streamed = StreamedUMT5(encoder)
    events = []
    put, run, wait = jax.device_put, umt5_streamed._run_layer, jax.block_until_ready

    def put_(x, *args):
        if isinstance(x, nnx.State):
            events.append("copy")
        return put(x, *args)

    monkeypatch.setattr(jax, "device_put", put_)
    monkeypatch.setattr(
        umt5_streamed, "_run_layer", lambda *args: [events.append("run"), run(*args)][1]
    )
    monkeypatch.setattr(jax, "block_until_ready", lambda x: [events.append("wait"), wait(x)][1])
    encode_text(streamed, tokenizer, PROMPTS)
    assert events == ["copy", *["copy", "run", "wait"] * 5, "run", "wait"]
