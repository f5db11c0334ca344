"""wan22-export in every format: the file is what was trained, or it is not there."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from export_runs import (
    ALPHA,
    RANK,
    SEVERAL,
    draw_adapter,
    start_lora_run,
    write_full_run,
    write_lora_run,
)
from safetensors import safe_open
from tiny_run import keep_programs

from convert import export, whole_model
from convert import weights as weights_command
from wan22_jax import adapter_file, full_file, model_folder, model_tensors, proof
from wan22_jax.adapter import Adapter, attach_adapter, load_adapter
from wan22_jax.demo_checkpoint import TINY_TRANSFORMER
from wan22_jax.errors import BadInput
from wan22_jax.lora_names import DIALECTS
from wan22_jax.model_folder import read_model_card
from wan22_jax.model_tensors import (
    FolderTensors,
    HeldTensors,
    MergedTensors,
    stacked_weight_shapes,
)
from wan22_jax.tensor_files import SafetensorsFiles
from wan22_jax.weights import name_tensors, stored_dtype, transformer_names, vae_names


class Runs(NamedTuple):
    model: Path
    lora: Path
    adapter: Adapter
    full: Path
    weights: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def runs(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with keep_programs(folder / "programs"):
        model, lora, adapter = start_lora_run(official, folder)
        weights = write_full_run(folder / "full", model, ckpt_path=folder / "elsewhere")
        yield Runs(model, lora, adapter, folder / "full", weights)


def run(*words: object) -> int:
    return export.main([str(word) for word in words])


def read(path: Path) -> dict[str, np.ndarray]:
    tensors = name_tensors(SafetensorsFiles(path), "transformer", transformer_names())
    return {name: tensors.read(name) for name in tensors.shapes}


def assert_same(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


def rounded(weights: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    return {name: array.astype(stored_dtype(name, dtype)) for name, array in weights.items()}


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_lora_is_written_in_each_dialect_and_proven_by_a_forward_pass(
    dialect, runs, tmp_path, capsys
):
    out = tmp_path / "lora.safetensors"
    assert run("--checkpoint", runs.lora, "--out", out, "--format", dialect) == 0
    line = capsys.readouterr().out
    assert f"bfloat16, rank 4, alpha 6, step 7, 0.0 MB, names of {dialect}; read back" in line
    assert "forward pass: relative error 2.6e-03 of what the LoRA changes, it changes" in line
    back = load_adapter(out)
    assert (set(back.ranks.values()), set(back.alphas.values())) == ({RANK}, {ALPHA})
    wanted = {n: m.astype(ml_dtypes.bfloat16) for n, m in runs.adapter.matrices.items()}
    assert_same(back.matrices, wanted)
    with safe_open(out, framework="numpy") as file:
        assert ("lora_adapter_metadata" in file.metadata()) == (dialect == "diffusers")
        header = file.metadata()
    assert header.keys() >= {"rank", "alpha", "targets", "step", "base_digest", "config_digest"}


def test_without_the_base_model_the_products_are_compared(runs, tmp_path, capsys):
    write_lora_run(tmp_path / "run", runs.model, ckpt_path=tmp_path / "gone")
    out = tmp_path / "lora.safetensors"
    assert run("--checkpoint", tmp_path / "run", "--out", out) == 0
    line = capsys.readouterr().out
    assert "products of A and B, without the base model: relative error 2." in line


def test_what_computes_something_else_is_deleted(runs, tmp_path, capsys, monkeypatch):
    """The bits are right, and what is made of them is not: an alpha that the reader loses."""

    def forget_alpha(path: Path) -> Adapter:
        adapter = load_adapter(path)
        return Adapter(adapter.matrices, dict.fromkeys(adapter.alphas, 4.0), {}, "")

    monkeypatch.setattr(adapter_file, "load_adapter", forget_alpha)
    monkeypatch.setattr(adapter_file, "_check_equal", lambda *_, **__: None)
    out = tmp_path / "lora.safetensors"
    for flags in ([], ["--model", runs.model]):
        assert run("--checkpoint", runs.lora, "--out", out, *flags) == 2
        error = capsys.readouterr().err
        assert "computes something else than what was trained (relative error" in error
        assert "it was deleted" in error
    assert not list(tmp_path.iterdir())


def test_a_zero_lora_is_called_untrained(runs):
    shapes = stacked_weight_shapes(FolderTensors(runs.model))
    adapter = draw_adapter(shapes, SEVERAL)
    matrices = {n: m * (".lora_A" in n) for n, m in adapter.matrices.items()}
    zero = Adapter(matrices, adapter.alphas, {}, "mine")
    base = FolderTensors(runs.model)
    for known in ({}, {"base": base, "config": TINY_TRANSFORMER}):
        line = proof.prove_adapter(zero, zero, dtype="float32", **known)
        assert line.endswith("the LoRA is zero (untrained), it changes nothing")


def test_the_streamed_forward_pass_is_that_of_the_model(runs):
    model = model_folder.load_transformer(runs.model, dtype="float32")
    base = FolderTensors(runs.model)
    several = draw_adapter(stacked_weight_shapes(base), SEVERAL)
    variants = [proof.Variant(base), proof.Variant(base, several)]
    start, found = proof.predict(TINY_TRANSFORMER, variants)
    attach_adapter(model, several)
    wanted = np.asarray(model(*proof.draw_inputs(TINY_TRANSFORMER)))
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    assert np.abs(wanted - start).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--format", "official"], "that of a whole model, .* holds a LoRA; add --merge"),
        (["--format", "kohya", "--merge"], "--format kohya is that of a LoRA"),
        (["--format", "model", "--merge"], "--format model is a folder; choose another --out"),
        (["--format", "fp8_scaled", "--merge", "--dtype", "float32"], "leave --dtype out"),
    ],
)
def test_formats_that_do_not_go_together_are_refused(flags, complaint, runs, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run("--checkpoint", runs.lora, "--out", out, *flags) == 2
    assert re.search(complaint, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


# --- Whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_full_fine_tuning_as_one_file(dtype, runs, tmp_path, capsys):
    out = tmp_path / "full.safetensors"
    words = ("--checkpoint", runs.full, "--model", runs.model, "--dtype", dtype, "--out", out)
    assert run(*words) == 0
    assert "equal bit by bit; forward pass: relative error" in capsys.readouterr().out
    assert_same(read(out), rounded(runs.weights, dtype))
    assert {"step", "config_digest"} <= SafetensorsFiles(out).metadata.keys()
    assert run(*words) == 2
    assert "exists already" in capsys.readouterr().err


def test_without_the_base_model_a_file_is_compared_bit_by_bit(runs, tmp_path, capsys):
    assert run("--checkpoint", runs.full, "--out", tmp_path / "full.safetensors") == 0
    assert "no forward pass, since the base model's folder is not" in capsys.readouterr().out
    assert run("--checkpoint", runs.full, "--out", tmp_path / "folder") == 2
    assert "add --model" in capsys.readouterr().err
    assert run("--checkpoint", runs.full, "--merge", "--out", tmp_path / "a.safetensors") == 2
    assert "is a whole model already; leave --merge out" in capsys.readouterr().err


def test_a_merged_lora_in_each_format(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(whole_model, "_SHARD_BYTES", 60_000)
    base = FolderTensors(runs.model)
    merged = MergedTensors(base, [(runs.adapter, 1.0)])
    weights = {name: merged.read(name) for name in merged.shapes}
    changed = [n for n, a in weights.items() if not np.array_equal(a, base.read(n))]
    assert len(changed) == 20
    wanted = rounded(weights, "bfloat16")
    words = ("--checkpoint", runs.lora, "--merge", "--out")
    for left in (".one.safetensors.partial", ".model.partial/vae/x", ".diffusers.partial/vae/x"):
        (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / left).write_text("of an export that was killed")
    assert run(*words, tmp_path / "one.safetensors") == 0
    assert "the LoRA changes the velocity by" in capsys.readouterr().out
    assert_same(read(tmp_path / "one.safetensors"), wanted)
    header = SafetensorsFiles(tmp_path / "one.safetensors").metadata
    (lora,) = json.loads(header["merged_loras"])
    assert (lora["rank"], lora["alpha"], lora["strength"], lora["step"]) == ("4", "6.0", 1.0, "7")

    assert run(*words, tmp_path / "model") == 0
    found = FolderTensors(tmp_path / "model")
    assert_same({name: found.read(name) for name in found.shapes}, wanted)
    assert model_folder.read_model_card(tmp_path / "model").source.startswith("a LoRA merged into")

    folder = tmp_path / "diffusers"
    assert run(*words, folder, "--format", "diffusers") == 0
    assert_same(read(folder / "transformer"), wanted)
    index = json.loads(
        (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    files = {path.name for path in (folder / "transformer").glob("*.safetensors")}
    assert len(files) > 2
    assert files == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in wanted.values())
    vae = name_tensors(SafetensorsFiles(folder / "vae"), "vae", vae_names(2))
    assert len(vae.shapes) == len(list((runs.model / "vae").glob("*.weight"))) + len(
        [*(runs.model / "vae").glob("*.bias"), *(runs.model / "vae").glob("*.gamma")]
    )
    capsys.readouterr()
    assert run(*words, folder, "--format", "diffusers") == 2
    assert run(*words, runs.lora, "--format", "diffusers", "--overwrite") == 2
    exists, other = capsys.readouterr().err.splitlines()
    assert "exists already" in exists
    assert "no folder of this kind, so it is not replaced" in other
    (tmp_path / "link").symlink_to(folder)
    (folder / "old").touch()
    assert run(*words, tmp_path / "link", "--format", "diffusers", "--overwrite") == 0
    assert not (folder / "old").exists()
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".*"))
    card = (runs.model / "model.json").read_bytes()
    for out, complaint in ((runs.model, "is the base model"), (folder / "a", "is no folder of")):
        (folder / "a").touch()
        assert run(*words, out, "--format", "model", "--overwrite") == 2
        assert complaint in capsys.readouterr().err
    assert (runs.model / "model.json").read_bytes() == card


def test_a_model_that_computes_something_else_is_deleted(runs, tmp_path, capsys, monkeypatch):
    def open_other(where: Path) -> HeldTensors:
        arrays = read(where)
        arrays["head.head.weight"] = -arrays["head.head.weight"]
        return HeldTensors(arrays)

    monkeypatch.setattr(whole_model, "_open_files", open_other)
    out = tmp_path / "one.safetensors"
    assert run("--checkpoint", runs.lora, "--merge", "--out", out) == 2
    assert "computes something else than the trained model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_lora_that_is_merged_a_little_wrongly_is_told_from_rounding(
    runs, tmp_path, capsys, monkeypatch
):
    """An error below that of bfloat16: the weights are compared before they are rounded, too."""
    exact = model_tensors.adapter_delta

    def weaken(adapter: Adapter, name: str) -> np.ndarray | None:
        delta = exact(adapter, name)
        return None if delta is None else np.float32(0.995) * delta

    monkeypatch.setattr(model_tensors, "adapter_delta", weaken)
    out = tmp_path / "one.safetensors"
    assert run("--checkpoint", runs.lora, "--merge", "--out", out) == 2
    assert re.search(r"relative error \S+e-0[34], float32 explains", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    tensors = HeldTensors({"patch_embedding.bias": np.array([1e6], np.float32)})
    with pytest.raises(BadInput, match=r"patch_embedding\.bias has values beyond float16"):
        full_file.write_full(tensors, tmp_path / "a.safetensors", dtype="float16", metadata={})
    assert not list(tmp_path.iterdir())


def test_fp8_scaled_is_what_comfyui_takes(runs, tmp_path, capsys):
    out = tmp_path / "full.safetensors"
    words = ("--checkpoint", runs.full, "--model", runs.model, "--format", "fp8_scaled")
    assert run(*words, "--out", out) == 0
    line = capsys.readouterr().out
    error = float(re.search(r"forward pass: relative error (\S+)", line)[1])
    assert 0.005 < error < 0.1
    files = SafetensorsFiles(out)
    weights = {n for n, a in runs.weights.items() if n.startswith("blocks.") and a.ndim == 2}
    weights = {name for name in weights if name.endswith(".weight")}
    assert len(weights) == 20
    assert {n for n, kind in files.dtypes.items() if kind == "F8_E4M3"} == weights | {"scaled_fp8"}
    assert files.shapes["scaled_fp8"] == (0,)
    for name in runs.weights.keys() - weights:
        np.testing.assert_array_equal(
            files.read(name), runs.weights[name].astype(stored_dtype(name, "bfloat16"))
        )
    for name in weights:
        scale = files.read(name.removesuffix("weight") + "scale_weight")
        assert (scale.dtype, scale.shape) == (np.float32, ())
        values = files.read(name).astype(np.float32) * scale
        wanted = runs.weights[name]
        assert np.abs(values - wanted).max() <= np.abs(wanted).max() / 16, name
    assert len(files.shapes) == len(runs.weights) + len(weights) + 1
    assert_same(
        {n: a.astype(np.float32) for n, a in read(out).items() if n in weights},
        {
            n: files.read(n).astype(np.float32)
            * files.read(n.removesuffix("weight") + "scale_weight")
            for n in weights
        },
    )


def test_a_model_file_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    def flip_last_byte(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        os.pwrite(descriptor, b"\x7f", size - 1)

    monkeypatch.setattr(full_file.os, "fsync", flip_last_byte)
    tensors = HeldTensors({"a.bias": np.ones(3, np.float32), "b.bias": np.ones(3, np.float32)})
    with pytest.raises(BadInput, match=r"model\.safetensors: reads back differently.*\(b\.bias\)"):
        full_file.write_full(tensors, tmp_path / "model.safetensors", dtype="float32", metadata={})
    assert not list(tmp_path.iterdir())


# --- There and back -------------------------------------------------------------------------------


@pytest.mark.long
def test_what_is_exported_can_be_converted_again(runs, official, tmp_path):
    """Out by wan22-export, in by wan22-convert: the digest of the model folder is the same."""
    source = ("--checkpoint", runs.full, "--model", runs.model, "--dtype", "bfloat16")
    outs = {"model": "folder", "official": "one.safetensors", "diffusers": "hub"}
    outs["fp8_scaled"] = "scaled.safetensors"
    for kind, name in outs.items():
        flags = source[:4] if kind == "fp8_scaled" else source
        assert run(*flags, "--format", kind, "--out", tmp_path / name) == 0
    digests = {}
    for kind, name in list(outs.items())[1:]:
        place = tmp_path / name / "transformer" if kind == "diffusers" else tmp_path / name
        words = ["--ckpt_path", official, "--transformer", place, "--out", tmp_path / f"{kind}_in"]
        if kind != "diffusers":  # a file has no config beside it, and this is no TI2V-5B
            (tmp_path / "config.json").write_bytes((official / "config.json").read_bytes())
        assert weights_command.main([str(word) for word in words]) == 0
        digests[kind] = read_model_card(tmp_path / f"{kind}_in").digests["transformer"]
    wanted = read_model_card(tmp_path / "folder").digests["transformer"]
    assert digests["official"] == digests["diffusers"] == wanted
    assert digests["fp8_scaled"] != wanted
    found, exact = (FolderTensors(tmp_path / name) for name in ("fp8_scaled_in", "folder"))
    for name in exact.shapes:
        got, want = (np.asarray(each.read(name), np.float32) for each in (found, exact))
        assert np.linalg.norm(got - want) <= 0.04 * np.linalg.norm(want), name
