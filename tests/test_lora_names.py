"""Names and headers of LoRA files: three dialects written, those of other makers read."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from export_runs import ALL, SEVERAL, draw_adapter
from safetensors import safe_open

from wan22_jax.adapter import Adapter, check_fit, from_tensors, load_adapter, to_tensors
from wan22_jax.adapter_file import write_adapter
from wan22_jax.adapter_targets import LoRATarget
from wan22_jax.errors import BadInput
from wan22_jax.lora_names import DIALECTS, Entry, Kind, read_name, spell_name

SHAPES = dict.fromkeys(ALL, (2, 6, 6)) | {"ffn.0": (2, 9, 6), "ffn.2": (2, 6, 9)}
EVEN = dict.fromkeys(ALL, LoRATarget(3, 3.0))  # alpha is the rank
UNEVEN = dict.fromkeys(ALL, LoRATarget(3, 0.5))
EXAMPLES = {
    "comfyui": "diffusion_model.blocks.29.self_attn.o.lora_A.weight",
    "diffusers": "transformer.blocks.29.attn1.to_out.0.lora_A.weight",
    "kohya": "lora_unet_blocks_29_self_attn_o.lora_down.weight",
}
KINDS: tuple[Kind, ...] = ("lora_A", "lora_B", "alpha")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_is_a_bijection(dialect):
    kinds = KINDS[: 2 if dialect == "diffusers" else 3]
    entries = [Entry(layer, t, kind) for layer in range(30) for t in ALL for kind in kinds]
    names = [spell_name(dialect, entry) for entry in entries]
    assert len(set(names)) == len(entries) == 300 * len(kinds)
    read = [read_name(name) for name in names]
    assert [found and found[0] for found in read] == entries
    assert spell_name(dialect, Entry(29, "self_attn.o", "lora_A")) == EXAMPLES[dialect]
    spellings = [found[1] for found in read if found is not None]
    assert all(spellings[0].agrees(spelling) for spelling in spellings)


def test_diffusers_has_no_name_for_an_alpha():
    with pytest.raises(KeyError):
        spell_name("diffusers", Entry(0, "ffn.0", "alpha"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("targets", [EVEN, UNEVEN, SEVERAL], ids=["even", "uneven", "several"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_files_come_back_bit_for_bit(dialect, targets, dtype, tmp_path: Path):
    drawn = draw_adapter(SHAPES, targets)
    matrices = {name: matrix.astype(dtype) for name, matrix in drawn.matrices.items()}
    adapter = Adapter(matrices, drawn.alphas, drawn.metadata, "mine")
    path = tmp_path / "lora.safetensors"
    write_adapter(adapter, path, dialect)
    back = load_adapter(path)
    assert (back.alphas, back.ranks) == (adapter.alphas, adapter.ranks)
    assert back.metadata == adapter.metadata
    assert back.matrices.keys() == matrices.keys()
    for name, matrix in matrices.items():
        assert back.matrices[name].dtype == matrix.dtype
        assert back.matrices[name].tobytes() == matrix.tobytes(), name


@pytest.mark.parametrize(
    ("dialect", "targets", "alphas"),
    [
        ("comfyui", EVEN, 0),
        ("comfyui", UNEVEN, 20),
        ("comfyui", SEVERAL, 2),  # of one target, whose alpha is not its rank
        ("kohya", EVEN, 20),  # always: what reads kohya's names expects them
        ("diffusers", UNEVEN, 0),
    ],
)
def test_alphas_are_where_each_dialect_has_them(dialect, targets, alphas):
    tensors = to_tensors(draw_adapter(SHAPES, targets), dialect)
    assert sum(name.endswith(".alpha") for name in tensors) == alphas


def test_diffusers_header_is_peft_config_by_target(tmp_path: Path):
    path = tmp_path / "lora.safetensors"
    write_adapter(draw_adapter(SHAPES, SEVERAL | {"ffn.2": LoRATarget(3, 3.0)}), path, "diffusers")
    with safe_open(path, framework="numpy") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
        assert json.loads(file.metadata()["targets"]) == ["self_attn.q", "ffn.0", "ffn.2"]
    assert fields == {
        "transformer.peft_type": "LORA",
        "transformer.r": 3,
        "transformer.lora_alpha": 3,
        "transformer.target_modules": ["attn1.to_q", "ffn.net.0.proj", "ffn.net.2"],
        "transformer.rank_pattern": {"attn1.to_q": 2},
        "transformer.alpha_pattern": {"attn1.to_q": 6},
    }


def write_peft(path: Path, prefix: str, **config) -> None:
    """A file as PEFT writes it, with rank 3 and no alphas, and its config beside it."""
    tensors = {
        f"{prefix}blocks.{layer}.attn1.to_q.lora_{side}.weight": np.ones(shape, np.float32)
        for layer in range(2)
        for side, shape in (("A", (3, 6)), ("B", (6, 3)))
    }
    safetensors.numpy.save_file(tensors, path)
    path.with_name("adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"r": 3, "lora_alpha": 12}, 12.0),
        ({"r": 3, "lora_alpha": 12, "use_rslora": True}, 12 * math.sqrt(3)),
        ({"r": 8, "lora_alpha": 8, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 1}}, 1.0),
        ({"r": 3, "lora_alpha": 3, "alpha_pattern": {r"^blocks\.\d.attn1.to_q": 2}}, 2.0),
    ],
)
def test_the_alpha_of_peft_is_in_the_config_beside_its_file(config, alpha, tmp_path: Path):
    path = tmp_path / "adapter_model.safetensors"
    write_peft(path, "base_model.model.", **config)
    assert load_adapter(path).alphas == {"self_attn.q": alpha}
    write_peft(path, "transformer.", **config)  # not PEFT's own names: the config is another's
    assert load_adapter(path).alphas == {"self_attn.q": 3.0}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"r": 4, "lora_alpha": 4}, r"rank 4 stated for blocks\.0\.attn1\.to_q, its matrices have"),
        ({"lora_alpha": 4}, "r and lora_alpha expected"),
        ({"r": 3, "lora_alpha": 10**400}, "r and lora_alpha expected"),
    ],
)
def test_a_peft_config_that_does_not_fit_is_refused(config, complaint, tmp_path: Path):
    path = tmp_path / "adapter_model.safetensors"
    write_peft(path, "base_model.model.", **config)
    with pytest.raises(BadInput, match=rf"adapter_model\.safetensors: what PEFT says.*{complaint}"):
        load_adapter(path)
    path.with_name("adapter_config.json").write_text("{")
    with pytest.raises(BadInput, match=r"adapter_config\.json: is not JSON"):
        load_adapter(path)


def test_names_of_diffsynth_are_read():
    tensors = {
        f"blocks.0.ffn.2.lora_{side}.default.weight": np.ones(shape, np.float32)
        for side, shape in (("A", (3, 9)), ("B", (6, 3)))
    }
    assert from_tensors(tensors, metadata={}, source="file").ranks == {"ffn.2": 3}


@pytest.mark.parametrize(
    "second",
    [
        "transformer.blocks.0.self_attn.q.lora_B.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_B.default.weight",
        "transformer.blocks.0.attn1.to_q.lora_B.weight",
    ],
)
def test_one_file_spells_its_names_alike(second):
    first = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
    with pytest.raises(BadInput, match=f"names of two makers, {first} and {second}"):
        from_tensors({first: np.ones((3, 6)), second: np.ones((6, 3))}, metadata={}, source="file")


def test_a_linear_that_is_adapted_in_some_blocks_only_is_refused():
    tensors = to_tensors(draw_adapter(SHAPES, UNEVEN))
    for name in [name for name in tensors if ".blocks.0.ffn" in name]:
        del tensors[name]
    with pytest.raises(BadInput, match=r"in every block or in none, missing: blocks\.0\.ffn\.0\.a"):
        from_tensors(tensors, metadata={}, source="file")


def test_a_lora_of_another_model_is_named_with_both_shapes():
    other = draw_adapter({"self_attn.q": (3, 5120, 6)}, {"self_attn.q": LoRATarget(1, 1.0)})
    with pytest.raises(BadInput) as refusal:
        check_fit(other, {"self_attn.q": (30, 3072, 3072)})
    for part in (
        "blocks.self_attn.q.lora_A is [3, 1, 6], the model takes [30, 1, 3072]",
        "blocks.self_attn.q.lora_B is [3, 5120, 1], the model takes [30, 3072, 1]",
        "of Wan2.1 or Wan2.2 14B",
    ):
        assert part in str(refusal.value)
