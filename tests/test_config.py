"""What does the schema take, and what does it refuse?"""

from pathlib import Path

import pytest

from wan22_jax.config import dump_config, load_config, load_dataset
from wan22_jax.errors import BadInput

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG, DATASET = CONFIGS / "wan2.2_5b_lora.toml", CONFIGS / "dataset_video.toml"


@pytest.mark.parametrize("path", [CONFIG, CONFIGS / "tiny" / "lora.toml"])
def test_the_configs_of_the_repository_load_and_are_written_back(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.toml") == config


def test_the_dataset_file_of_the_repository_loads():
    assert load_dataset(DATASET).directory


def test_an_override_wins_over_the_file():
    assert load_config(CONFIG, ["optimizer.lr=0.5", "model.shift=3"]).model.shift == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key optimizer.lrr, did you mean optimizer.lr?"),
        ("ckpt_path='x'", "unknown key ckpt_path, did you mean model.ckpt_path?"),
        ("epochs=1.5", "key epochs: Input should be a valid integer, got 1.5"),
        ("epochs=0", "key epochs: Input should be greater than or equal to 1"),
        ("optimizer.lr=inf", "key optimizer.lr: "),
        ("model.shift=inf", "key model.shift: "),
        ("gradient_clipping=nan", "key gradient_clipping: "),
        ("optimizer.betas=[0.9,1.5]", "key optimizer.betas.1: "),
        ("optimizer.betas=[0.9]", "key optimizer.betas: "),
        ("optimizer.type='prodigy'", "use 'adamw'"),
        ("model.min_t=1.0", "key model.min_t: "),
        ("blocks_to_swap=3", "blocks_to_swap = 3: streaming blocks from host memory"),
        ("adapter.type='lokr'", "LoKr is not supported by this version yet"),
        ("model.transformer_dtype='float8_e5m2'", "e5m2 keeps two bits of a weight's mantissa"),
        ("model=3", "key model: "),
        ("novalue", "expected key.path=value"),
    ],
)
def test_what_is_refused_is_named(override, message):
    with pytest.raises(BadInput) as refusal:
        load_config(CONFIG, [override])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "is not valid TOML"),
        (b"output_dir = '\xe9'", "is not valid TOML"),
        (b"", "key output_dir is missing"),
    ],
)
def test_a_broken_file_is_named(content, message, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=rf"bad\.toml: .*{message}"):
        load_config(path)
    with pytest.raises(BadInput, match=r"none\.toml: no such config file"):
        load_config(tmp_path / "none.toml")
