"""A SentencePiece model as tokenizer.json: SentencePiece's own ids (golden/make_spiece.py)."""

from pathlib import Path

import numpy as np
import pytest
from golden.make_spiece import PROMPTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from convert.spiece import make_tokenizer_json
from wan22_jax.errors import BadInput
from wan22_jax.text import load_tokenizer, tokenize

GOLDEN = Path(__file__).parent / "golden" / "spiece.npz"
WHERE = Path("x.safetensors")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(golden):
    return golden["model"].tobytes()


def test_ids_are_those_of_sentencepiece(golden, model):
    tokenizer = Tokenizer.from_str(make_tokenizer_json(model, WHERE).decode())
    used = set()
    for prompt, ids in zip(PROMPTS, golden["ids"], strict=True):
        found = tokenizer.encode(prompt)
        assert found.ids == [i for i in ids if i >= 0], prompt
        used |= set(found.tokens)
    assert {"<0xF0>", "</s>"} <= used  # a byte of an unknown character, the end
    assert any(len(token) > 3 and token.startswith("▁") for token in used)


def test_the_project_s_own_reader_takes_it(model, golden, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(make_tokenizer_json(model, WHERE))
    tokens_BS, mask_BS = tokenize(load_tokenizer(tmp_path), PROMPTS[:2])
    assert tokens_BS[0][mask_BS[0]].tolist() == [i for i in golden["ids"][0] if i >= 0]
    assert tokens_BS[1][mask_BS[1]].tolist() == [1]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda model: model[:0], "it has no pieces"),
        (lambda model: model[:-9], "it is cut short"),
        (lambda model: b"\xff" * 20 + model, "a number of more than 64 bits"),
        (lambda model: b"\x0b" + model, "a field of the unknown type 3"),
        (lambda model: b"\x08\x01" + model, "a number stands where a text was expected"),
        (lambda model: model.replace(b"\x0a\x04</s>", b"\x0a\x04</t>"), "with </s>"),
        (lambda model: model + b"\x12\x02\x18\x02", "of the Unigram kind"),
        (lambda model: model + b"\x1a\x06\x12\x04\xff\xff\xff\xff", "table of characters"),
        (lambda model: model + b"\x1a\x03\x12\x01\xff", "a SentencePiece model was expected"),
    ],
)
def test_a_damaged_model_is_one_line(damage, why, model):
    with pytest.raises(BadInput, match=rf"^x\.safetensors: .*{why}"):
        make_tokenizer_json(damage(model), WHERE)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damage_is_read_or_refused(data, model):
    content = bytearray(model)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        make_tokenizer_json(bytes(content[: data.draw(st.integers(0, len(content)))]), WHERE)
    except BadInput as error:
        refusal = str(error)
    else:
        return
    assert refusal.startswith("x.safetensors: ")
