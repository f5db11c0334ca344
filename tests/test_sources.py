"""wan22-convert from files made for ComfyUI, and from a place of its own for each network."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import (
    TEXT_FILE,
    VAE_FILE,
    assert_same_arrays,
    read_arrays,
    write_diffusers_folder,
)

from convert.checkpoints import Sources, open_checkpoint
from convert.weights import convert, main
from wan22_jax import model_folder
from wan22_jax.demo_checkpoint import TINY_TEXT_ENCODER, TINY_VAE, write_checkpoint
from wan22_jax.errors import BadInput
from wan22_jax.model.transformer import TransformerConfig
from wan22_jax.model_folder import read_model_card
from wan22_jax.text import load_tokenizer
from wan22_jax.weights import text_encoder_names

SPIECE = Path(__file__).parent / "golden" / "spiece.npz"
E4M3 = ml_dtypes.float8_e4m3fn
# Heads of 128, as where there is no config to say so.
TRANSFORMER = TransformerConfig(
    dim=256, ffn_dim=32, num_heads=2, num_layers=2, text_dim=32, freq_dim=16
)
FILES = {
    "transformer": "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors",
    "vae": "vae/wan2.2_vae.safetensors",
    "text_encoder": "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """An official folder whose numbers are those that the files for ComfyUI mean."""
    folder = tmp_path_factory.mktemp("rounded")
    write_checkpoint(folder, captions=["a cat"], transformer=TRANSFORMER)
    for file in [*folder.glob("diffusion_pytorch_model*.safetensors"), folder / VAE_FILE]:
        halves = {name: array.astype("f2") for name, array in load_file(file).items()}
        save_file({name: array.astype("f4") for name, array in halves.items()}, file)
    save_file(
        {n: a.astype("f4") for n, (a, scale) in quantised(folder).items() if scale is None}
        | {n: a.astype("f4") * s for n, (a, s) in quantised(folder).items() if s is not None},
        folder / TEXT_FILE,
    )
    return folder


@pytest.fixture(scope="module")
def comfyui(rounded, tmp_path_factory):
    """The models folder of a ComfyUI with the three files, and with others beside them."""
    models = tmp_path_factory.mktemp("comfyui") / "models"
    for file in FILES.values():
        (models / file).parent.mkdir(parents=True)
    tensors = {}
    for shard in rounded.glob("diffusion_pytorch_model*.safetensors"):
        tensors |= load_file(shard)
    save_file({n: a.astype("f2") for n, a in tensors.items()}, models / FILES["transformer"])
    tensors = load_file(rounded / VAE_FILE)
    save_file({n: a.astype("f2") for n, a in tensors.items()}, models / FILES["vae"])
    write_scaled_text_encoder(rounded, models / FILES["text_encoder"])
    other = {"patch_embedding.weight": np.zeros((5120, 36, 1, 2, 2), "i1")}
    save_file(other, models / "diffusion_models" / "wan2.1_14B.safetensors")
    (models / "diffusion_models" / "broken.safetensors").write_bytes(b"broken")
    save_file({"conv2.weight": np.zeros((16, 16, 1, 1, 1))}, models / "vae" / "wan_2.1.safetensors")
    return models


def quantised(folder):
    """The text encoder as ComfyUI's file has it: float8 with a scale, or float16."""
    stored = {}
    for name, weight in load_file(folder / TEXT_FILE).items():
        wide = weight.astype("f4")
        if wide.ndim == 1 or "embedding" in name:
            stored[name] = wide.astype("f2"), None
        else:
            scale = np.full((), np.float32(2.0) ** np.ceil(np.log2(np.abs(wide).max() / 448)), "f4")
            stored[name] = (wide / scale).astype(E4M3), scale
    return stored


def write_scaled_text_encoder(folder, file):
    with np.load(SPIECE) as golden:
        tensors = {"scaled_fp8": np.zeros(0, E4M3), "spiece_model": golden["model"]}
    for name, (weight, scale) in quantised(folder).items():
        theirs = text_encoder_names().to_diffusers(name)
        tensors[theirs] = weight
        if scale is not None:
            tensors[theirs.removesuffix("weight") + "scale_weight"] = scale
    assert sum(array.dtype == E4M3 for array in tensors.values()) == 15
    save_file(tensors, file)


@pytest.fixture(scope="module")
def expected(rounded, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    return out, convert(rounded, out)


# What is read


def test_comfyui_s_folder_is_the_model_that_its_files_mean(comfyui, expected, capsys, tmp_path):
    assert main(["--ckpt_path", str(comfyui.parent), "--out", str(tmp_path / "out")]) == 0
    card = read_model_card(tmp_path / "out")
    assert card.digest in capsys.readouterr().out
    assert (card.transformer, card.vae) == (TRANSFORMER, TINY_VAE)
    assert card.text_encoder == TINY_TEXT_ENCODER
    assert card.source == str(comfyui.parent)
    for network in ("transformer", "vae"):
        assert card.digests[network] == expected[1].digests[network]
    found = read_arrays(model_folder.load_text_encoder(tmp_path / "out"))
    assert_same_arrays(found, read_arrays(model_folder.load_text_encoder(expected[0])))
    tokenizer = model_folder.tokenizer_folder(tmp_path / "out")
    assert sorted(file.name for file in tokenizer.iterdir()) == ["spiece.model", "tokenizer.json"]
    load_tokenizer(tokenizer)


def test_places_are_mixed_at_will(comfyui, rounded, expected, tmp_path):
    flags = [
        *("--ckpt_path", rounded, "--out", tmp_path / "out"),
        *("--transformer", comfyui / FILES["transformer"]),
        *("--vae", comfyui),
        *("--text_encoder", comfyui / FILES["text_encoder"]),
        *("--tokenizer", rounded / "google" / "umt5-xxl" / "tokenizer.json"),
    ]
    assert main(list(map(str, flags))) == 0
    card = read_model_card(tmp_path / "out")
    assert card.digests["vae"] == expected[1].digests["vae"]
    assert card.digests["transformer"] == expected[1].digests["transformer"]
    assert card.source == ", ".join(
        [str(rounded), *(f"{flags[i][2:]} {flags[i + 1]}" for i in range(4, len(flags), 2))]
    )
    tokenizer = model_folder.tokenizer_folder(tmp_path / "out")
    assert [file.name for file in tokenizer.iterdir()] == ["tokenizer.json"]


def test_folders_of_one_network_are_found(official, tmp_path):
    """Each --flag takes a folder in any layout, or the network's own."""
    diffusers = tmp_path / "diffusers"
    diffusers.mkdir()
    write_diffusers_folder(official, diffusers)
    whole = open_checkpoint(Sources(official))
    for transformer in (diffusers, diffusers / "transformer", official):
        for other in (diffusers, official):
            found = open_checkpoint(Sources(None, transformer, other, other))
            assert found.transformer_config == whole.transformer_config
            assert found.text_encoder.shapes == whole.text_encoder.shapes
            assert found.tokenizer == whole.tokenizer
    own = Sources(official, None, diffusers / "vae", diffusers / "text_encoder")
    assert open_checkpoint(own).vae.shapes == whole.vae.shapes
    no_folder = dict(zip(("transformer", "vae", "text_encoder"), [official] * 3, strict=True))
    assert open_checkpoint(Sources(**no_folder)).tokenizer == whole.tokenizer


def test_a_config_beside_the_file_wins(official, tmp_path):
    shards = [load_file(file) for file in sorted(official.glob("diffusion_pytorch_model*"))[:3]]
    save_file(shards[0] | shards[1] | shards[2], tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=r"x\.safetensors: its sizes cannot be told from a width"):
        open_checkpoint(Sources(official, transformer=tmp_path / "x.safetensors"))
    shutil.copy(official / "config.json", tmp_path)
    found = open_checkpoint(Sources(official, transformer=tmp_path / "x.safetensors"))
    assert found.transformer_config == open_checkpoint(Sources(official)).transformer_config


def test_a_tokenizer_folder_with_the_model_alone_gets_its_json(official, tmp_path):
    with np.load(SPIECE) as golden:
        (tmp_path / "spiece.model").write_bytes(golden["model"].tobytes())
    for place in (tmp_path, tmp_path / "spiece.model"):
        found = open_checkpoint(Sources(official, tokenizer=place))
        assert list(found.tokenizer) == ["spiece.model", "tokenizer.json"]
        assert "model" in json.loads(found.tokenizer["tokenizer.json"])


def test_a_float8_transformer_is_quantised_anew_from_its_numbers(comfyui, expected, tmp_path):
    """--dtype float8 has one rule, whatever the source: the digest is that of the numbers."""
    stored = load_file(comfyui / FILES["transformer"])
    as_float8, meant = {}, {}
    for name, half in stored.items():
        meant[name] = half
        if half.ndim == 2 and name.startswith("blocks."):
            scale = np.full((), 2.0**-8, "f4")
            as_float8[f"model.diffusion_model.{name}"] = (half.astype("f4") / scale).astype(E4M3)
            as_float8[f"model.diffusion_model.{name}_scale"] = scale
            meant[name] = (half.astype("f4") / scale).astype(E4M3).astype("f4") * scale
        else:
            as_float8[f"model.diffusion_model.{name}"] = half
    cards = []
    for file, tensors in (("float8", as_float8), ("meant", meant)):
        save_file(tensors, tmp_path / f"{file}.safetensors")
        sources = Sources(comfyui, transformer=tmp_path / f"{file}.safetensors")
        cards.append(convert(sources, tmp_path / file, dtype="float8"))
    assert cards[0].digests == cards[1].digests
    assert cards[0].digests["transformer"] != expected[1].digests["transformer"]
    arrays = read_arrays(model_folder.load_transformer(tmp_path / "float8"))
    assert arrays["blocks.ffn.0.weight"].dtype == jnp.float8_e4m3fn


# What is refused


def refusal(capsys, tmp_path, *flags):
    assert main([*map(str, flags), "--out", str(tmp_path / "out")]) == 2
    assert list(tmp_path.glob("out*")) == []
    last = capsys.readouterr().err.splitlines()[-1]  # there may be a progress bar before it
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize("flag", ["transformer", "vae", "text_encoder"])
def test_a_source_must_exist_and_be_of_its_network(flag, comfyui, capsys, tmp_path):
    place = ("--ckpt_path", comfyui, f"--{flag}")
    error = refusal(capsys, tmp_path, *place, tmp_path / "nowhere")
    assert "nowhere: neither a file nor a folder" in error
    other = FILES["vae" if flag == "transformer" else "transformer"]
    error = refusal(capsys, tmp_path, *place, comfyui / other)
    assert f"{other}: holds nothing of the {flag.replace('_', ' ')} (" in error
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0\0\0\0")
    error = refusal(capsys, tmp_path, *place, tmp_path / "x.gguf")
    assert "x.gguf: GGUF files cannot be read" in error


def test_without_ckpt_path_every_network_needs_a_place(comfyui, capsys, tmp_path):
    flags = [f for n in ("transformer", "vae") for f in (f"--{n}", comfyui / FILES[n])]
    error = refusal(capsys, tmp_path, *flags)
    assert "no source of the text encoder; add --text_encoder or --ckpt_path" in error
    assert "no source of the transformer" in refusal(capsys, tmp_path)


def test_a_tokenizer_must_be_one(comfyui, rounded, capsys, tmp_path):
    place = ("--ckpt_path", comfyui, "--tokenizer")
    error = refusal(capsys, tmp_path, *place, tmp_path / "nowhere")
    assert "nowhere: the tokenizer, tokenizer.json or spiece.model, was expected" in error
    (tmp_path / "empty").mkdir()
    error = refusal(capsys, tmp_path, *place, tmp_path / "empty")
    assert "empty: tokenizer.json or spiece.model was expected" in error
    error = refusal(capsys, tmp_path, *place, rounded / VAE_FILE)
    assert f"{VAE_FILE}: a SentencePiece model was expected" in error
    for text, complaint in (("{}", "is no tokenizer; give"), ("{", "tokenizer.json is no JSON")):
        (tmp_path / "other.json").write_text(text)
        error = refusal(capsys, tmp_path, *place, tmp_path / "other.json")
        assert f"other.json: {complaint}" in error
    shutil.copy(rounded / TEXT_FILE, tmp_path / "x.safetensors")
    error = refusal(
        capsys, tmp_path, "--ckpt_path", comfyui, "--text_encoder", tmp_path / "x.safetensors"
    )
    assert "x.safetensors: the tokenizer, tokenizer.json or spiece.model, was expected" in error


def test_comfyui_s_folder_must_have_each_network_once(comfyui, capsys, tmp_path):
    models = shutil.copytree(comfyui, tmp_path / "models")
    twin = models / "vae" / "twin.safetensors"
    shutil.copy(models / FILES["vae"], twin)
    error = refusal(capsys, tmp_path, "--ckpt_path", models)
    assert "the vae of TI2V-5B is here more than once (twin.safetensors, wan2.2_vae" in error
    assert "add --vae FILE" in error
    twin.unlink()
    (models / FILES["transformer"]).unlink()
    error = refusal(capsys, tmp_path, "--ckpt_path", models)
    assert "unet: the transformer of TI2V-5B was expected here; download it or add" in error


def test_half_floats_that_overflowed_are_refused(comfyui, capsys, tmp_path):
    tensors = dict(load_file(comfyui / FILES["vae"]))
    tensors["decoder.conv1.bias"][1] = np.inf
    save_file(tensors, tmp_path / "x.safetensors")
    flags = ("--ckpt_path", comfyui, "--vae", tmp_path / "x.safetensors")
    error = refusal(capsys, tmp_path, *flags)
    assert "x.safetensors: decoder.conv1.bias has infinite or NaN values" in error


def test_another_transformer_is_named(comfyui, capsys, tmp_path):
    tensors = dict(load_file(comfyui / FILES["transformer"]))
    tensors["patch_embedding.weight"] = np.zeros((256, 36, 1, 2, 2), "f2")
    save_file(tensors, tmp_path / "x.safetensors")
    flags = ("--ckpt_path", comfyui, "--transformer", tmp_path / "x.safetensors")
    assert "x.safetensors: this is Wan2.1 or Wan2.2 14B" in refusal(capsys, tmp_path, *flags)
