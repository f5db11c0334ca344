"""PyTorch folder to model folder: same bits, same digests, little memory, all or nothing."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import convert.weights
import convert.written_network
from convert.weights import convert as convert_folder
from convert.weights import main
from wan22_jax import model_folder, weights
from wan22_jax.demo_checkpoint import (
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE,
    write_checkpoint,
)
from wan22_jax.errors import BadInput
from wan22_jax.model.vae import WAN22_VAE
from wan22_jax.outputs import replace_folder
from wan22_jax.tensor_files import SafetensorsFiles
from wan22_jax.weights import text_encoder_names, transformer_names, vae_names

VAE_FILE = "Wan2.2_VAE.safetensors"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.safetensors"


@pytest.fixture(scope="module")
def diffusers(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    write_diffusers_folder(official, folder)
    return folder


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "bfloat16"
    return out, convert_folder(official, out, dtype="bfloat16")


@pytest.fixture
def copied(official, tmp_path):
    """A copy of the official folder to break."""
    return shutil.copytree(official, tmp_path / "official")


def write_diffusers_folder(official, folder):
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": TINY_TRANSFORMER.num_heads,
        "attention_head_dim": TINY_TRANSFORMER.dim // TINY_TRANSFORMER.num_heads,
        "ffn_dim": TINY_TRANSFORMER.ffn_dim,
        "num_layers": TINY_TRANSFORMER.num_layers,
        "in_channels": TINY_TRANSFORMER.in_channels,
        "out_channels": TINY_TRANSFORMER.out_channels,
        "text_dim": TINY_TRANSFORMER.text_dim,
        "text_len": TINY_TRANSFORMER.text_len,
        "freq_dim": TINY_TRANSFORMER.freq_dim,
        "patch_size": [1, 2, 2],
        "eps": 1e-6,
    }
    statistics = {
        "latents_mean": list(WAN22_VAE.latents_mean),
        "latents_std": list(WAN22_VAE.latents_std),
    }
    transformer = {}
    for shard in official.glob("diffusion_pytorch_model*.safetensors"):
        transformer |= load_file(shard)
    parts = {
        "transformer": (transformer, transformer_names(), config),
        "vae": (load_file(official / VAE_FILE), vae_names(2), statistics),
        "text_encoder": (load_file(official / TEXT_FILE), text_encoder_names(), {}),
    }
    for name, (tensors, table, fields) in parts.items():
        (folder / name).mkdir()
        renamed = {table.to_diffusers(key): array for key, array in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(fields))
    shutil.copytree(official / "google" / "umt5-xxl", folder / "tokenizer")


def read_arrays(module):
    return {
        ".".join(map(str, path)): np.asarray(leaf.get_value())
        for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


def assert_same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


# What is written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_networks_are_the_loaded_ones(dtype, official, converted, tmp_path):
    out = converted[0]
    if dtype == "float32":
        out = tmp_path / "float32"
        convert_folder(official, out, dtype=dtype)
    transformer = weights.load_transformer(official, TINY_TRANSFORMER, dtype=dtype)
    vae = weights.load_vae(official / VAE_FILE, TINY_VAE, dtype="float32")
    text_encoder = weights.load_umt5(official / TEXT_FILE, TINY_TEXT_ENCODER, dtype=dtype)
    found = read_arrays(model_folder.load_transformer(out))
    assert found["blocks.ffn.0.weight"].dtype == dtype
    assert found["blocks.modulation"].dtype == "float32"
    assert_same_arrays(found, read_arrays(transformer))
    assert_same_arrays(read_arrays(model_folder.load_vae(out)), read_arrays(vae))
    assert_same_arrays(read_arrays(model_folder.load_text_encoder(out)), read_arrays(text_encoder))


def test_card_says_what_is_there(official, converted):
    out, card = converted
    assert model_folder.read_model_card(out) == card
    assert (card.dtype, card.source) == ("bfloat16", str(official))
    assert (card.transformer, card.vae) == (TINY_TRANSFORMER, TINY_VAE)
    assert card.text_encoder == TINY_TEXT_ENCODER
    hash(card.vae)  # lists in the JSON came back as tuples
    assert len({*card.digests.values(), card.digest}) == 4
    tokenizer = model_folder.tokenizer_folder(out)
    for path in (official / "google" / "umt5-xxl").iterdir():
        assert (tokenizer / path.name).read_bytes() == path.read_bytes()


def test_loading_casts_all_but_what_stays(converted):
    stored = read_arrays(model_folder.load_transformer(converted[0]))
    wide = read_arrays(model_folder.load_transformer(converted[0], dtype=jnp.float32))
    assert {array.dtype for array in wide.values()} == {np.dtype("float32")}
    assert_same_arrays(wide, {name: array.astype("float32") for name, array in stored.items()})
    vae = read_arrays(model_folder.load_vae(converted[0], dtype=jnp.bfloat16))
    assert {array.dtype for array in vae.values()} == {jnp.dtype("bfloat16")}


def test_plain_orbax_reads_it(converted):
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore((converted[0] / "transformer").absolute())
    assert_same_arrays(arrays, read_arrays(model_folder.load_transformer(converted[0])))


def test_layers_are_apart_on_disk(converted):
    folder = converted[0] / "transformer" / "blocks.self_attn.q.weight"
    chunks = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    assert chunks == ["0.0.0", "1.0.0"]


# Digests


def test_both_layouts_have_the_same_digest(diffusers, converted, tmp_path):
    card = convert_folder(diffusers, tmp_path / "out")
    assert (card.digest, card.digests) == (converted[1].digest, converted[1].digests)


def test_digest_is_of_what_is_stored(official, converted, copied, tmp_path):
    card = convert_folder(official, tmp_path / "float32", dtype="float32")
    assert card.digests["vae"] == converted[1].digests["vae"]
    assert card.digests["transformer"] != converted[1].digests["transformer"]
    tensors = load_file(copied / VAE_FILE)
    tensors["conv2.bias"].view(np.uint32)[0] ^= 1
    save_file(tensors, copied / VAE_FILE)
    tokenizer = copied / "google" / "umt5-xxl" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    card = convert_folder(copied, tmp_path / "out")
    assert card.digests["transformer"] == converted[1].digests["transformer"]
    assert card.digests["vae"] != converted[1].digests["vae"]
    assert card.digests["text_encoder"] != converted[1].digests["text_encoder"]
    assert card.digest != converted[1].digest


# Memory


def test_one_part_of_one_tensor_is_read_at_a_time(official, converted, monkeypatch, tmp_path):
    blocks = []
    read = SafetensorsFiles.read

    def watch(self, name, rows=slice(None)):
        block = read(self, name, rows)
        blocks.append((name, block.nbytes))
        return block

    monkeypatch.setattr(SafetensorsFiles, "read", watch)
    monkeypatch.setattr(convert.written_network, "_CHUNK_BYTES", 2**11)
    card = convert_folder(official, tmp_path / "out")
    embedding_bytes = TINY_TEXT_ENCODER.vocab_size * TINY_TEXT_ENCODER.dim * 2
    embedding_blocks = [size for name, size in blocks if name == "token_embedding.weight"]
    assert embedding_blocks == [2**11] * (embedding_bytes // 2**11)
    assert len(embedding_blocks) > 1
    layers = {name for name, _ in blocks if name.endswith("self_attn.q.weight")}
    assert layers == {"blocks.0.self_attn.q.weight", "blocks.1.self_attn.q.weight"}
    assert card.digest == converted[1].digest
    found = read_arrays(model_folder.load_text_encoder(tmp_path / "out"))
    assert_same_arrays(found, read_arrays(model_folder.load_text_encoder(converted[0])))


# All or nothing


def test_a_failure_leaves_what_the_next_run_goes_on_with(
    official, converted, monkeypatch, tmp_path
):
    read = SafetensorsFiles.read
    reads = []

    def fail(self, name, rows=slice(None)):
        reads.append(name)
        if len(reads) > 100:
            raise KeyboardInterrupt
        return read(self, name, rows)

    monkeypatch.setattr(SafetensorsFiles, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(official, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    noted = (tmp_path / "out.partial" / "progress.jsonl").read_text().count("\n") - 1
    assert 50 < noted <= 100
    num_reads = len(load_file(official / VAE_FILE)) + len(load_file(official / TEXT_FILE))
    num_reads += len(weights.parameter_shapes(model_folder.load_transformer(converted[0])))
    reads.clear()
    monkeypatch.setattr(
        SafetensorsFiles,
        "read",
        lambda self, name, rows=slice(None): reads.append(name) or read(self, name, rows),
    )
    card = convert_folder(official, tmp_path / "out")
    assert card.digest == converted[1].digest
    assert len(reads) == num_reads - noted  # the rest alone
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "progress.jsonl").exists()


def test_a_kill_leaves_nothing_that_looks_complete(official, converted, tmp_path):
    out = tmp_path / "out"
    program = (
        "import os, signal, convert.weights as c\n"
        "c.write_model_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"c.main(['--ckpt_path', {str(official)!r}, '--out', {str(out)!r}])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert (tmp_path / "out.partial" / "text_encoder").is_dir()  # it was nearly done
    for folder in (out, tmp_path / "out.partial"):
        with pytest.raises(BadInput, match="a converted model was expected"):
            model_folder.load_vae(folder)
    assert convert_folder(official, out).digest == converted[1].digest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_small_disk_is_refused_at_once(official, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BadInput, match=r"0\.1 GB are needed and 0\.0 GB free"):
        convert_folder(official, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_one_line(official, monkeypatch, capsys, tmp_path):
    def fail(*_, **__):
        raise ValueError(f"RESOURCE_EXHAUSTED: writing x: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(convert.written_network, "open_array", fail)
    out = tmp_path / "out"
    assert main(["--ckpt_path", str(official), "--out", str(out)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: the disk is full while writing {out}")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_an_existing_out_is_kept(official, converted, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="already exists"):
        convert_folder(official, out)
    with pytest.raises(BadInput, match="not a converted model, so it is not replaced"):
        convert_folder(official, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"
    (out / "model.json").write_text("{}")
    assert convert_folder(official, out, overwrite=True).digest == converted[1].digest
    assert not (out / "mine.txt").exists()
    (out / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(out)
    convert_folder(official, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert not (out / "mine.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_an_existing_folder_goes_only_once_the_other_has_its_name(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "lost", tmp_path / "out")
    assert (tmp_path / "out" / "old").is_file()
    (tmp_path / ".out.old").mkdir()  # of a run that was killed
    (tmp_path / "partial").mkdir()
    replace_folder(tmp_path / "partial", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Bad input


def test_command_prints_one_line(copied, converted, capsys, tmp_path):
    arguments = ["--ckpt_path", str(copied), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert converted[1].digest in capsys.readouterr().out
    (copied / "config.json").unlink()
    assert main([*arguments, "--overwrite"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert model_folder.read_model_card(tmp_path / "out").digest == converted[1].digest


def test_layouts_and_parts_are_named(copied, tmp_path):
    def fails(match):
        with pytest.raises(BadInput, match=match):
            convert_folder(copied, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    (copied / VAE_FILE).rename(tmp_path / VAE_FILE)
    fails(r"Wan2\.2_VAE\.pth: this file, or Wan2\.2_VAE\.safetensors, was expected")
    (tmp_path / VAE_FILE).rename(copied / VAE_FILE)
    (copied / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    fails(r"google/umt5-xxl: tokenizer\.json or spiece\.model was expected")
    config = json.loads((copied / "config.json").read_text())
    del config["ffn_dim"]
    (copied / "config.json").write_text(json.dumps(config))
    fails(r"config\.json: ffn_dim missing")
    (copied / "config.json").write_text("{")
    fails(r"config\.json: a JSON config was expected")
    (copied / "config.json").unlink()
    fails(r"official: config\.json \(official layout\), transformer/ \(Diffusers layout\)")


@pytest.mark.parametrize("fields", [{"dim": 5120}, {"in_dim": 16}, {"in_dim": 36}])
def test_configs_of_other_models_are_refused(fields, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(BadInput, match=r"config\.json: this is Wan2\.1 or Wan2\.2 14B"):
        convert_folder(copied, tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": "48"},
        {"dim": None},
        {"num_heads": 0},
        {"num_heads": 5},
        {"num_layers": -1},
        {"text_len": 512.0},
        {"eps": "1e-6"},
        {"patch_size": 2},
        {"patch_size": [1, 4, 4]},
    ],
)
def test_impossible_configs_are_refused(fields, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(BadInput, match=r"config\.json: .*; download Wan2\.2-TI2V-5B again"):
        convert_folder(copied, tmp_path / "out")


def test_folders_of_other_models_are_refused(copied, tmp_path):
    (copied / "high_noise_model").mkdir()
    with pytest.raises(BadInput, match=r"high_noise_model: this is Wan2\.1 or Wan2\.2 14B"):
        convert_folder(copied, tmp_path / "out")


def test_config_and_tensors_must_agree(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(BadInput, match=r"27 missing: blocks\.2\."):
        convert_folder(copied, tmp_path / "out")


def test_networks_must_fit_together(copied, tmp_path):
    text_encoder = dataclasses.replace(TINY_TEXT_ENCODER, dim=64)
    write_checkpoint(tmp_path / "wide", captions=["a cat"], text_encoder=text_encoder)
    shutil.copy(tmp_path / "wide" / TEXT_FILE, copied / TEXT_FILE)
    with pytest.raises(BadInput, match="text_dim 32 is not the 64"):
        convert_folder(copied, tmp_path / "out")


def test_other_latent_statistics_are_refused(diffusers, tmp_path):
    copied = shutil.copytree(diffusers, tmp_path / "diffusers")
    config = {"latents_mean": [0.0] * 48, "latents_std": list(WAN22_VAE.latents_std)}
    (copied / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"vae/config\.json: latents_mean is not that"):
        convert_folder(copied, tmp_path / "out")


def test_a_truncated_shard_is_named(copied, tmp_path):
    shard = copied / "diffusion_pytorch_model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(BadInput, match=r"00002-of-00003\.safetensors: a complete safetensors file"):
        convert_folder(copied, tmp_path / "out")


def test_a_damaged_model_folder_is_named(converted, tmp_path):
    out = shutil.copytree(converted[0], tmp_path / "out")
    chunk = out / "transformer" / "blocks.norm3.bias" / "1.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"blocks\.norm3\.bias/1\.0: this part .* cut short"):
        model_folder.load_transformer(out)
    shutil.rmtree(out / "vae")
    with pytest.raises(BadInput, match="vae: an Orbax checkpoint was expected"):
        model_folder.load_vae(out)
    card = json.loads((out / "model.json").read_text())
    card["transformer"]["num_layers"] = 3
    (out / "model.json").write_text(json.dumps(card))
    with pytest.raises(BadInput, match=r"arrays differ .*: blocks\.cross_attn\.k\.bias"):
        model_folder.load_transformer(out)
    (out / "model.json").write_text(json.dumps(card | {"version": 2}))
    with pytest.raises(BadInput, match="not a model card of this version"):
        model_folder.read_model_card(out)
