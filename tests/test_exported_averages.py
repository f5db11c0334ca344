"""--ema in every format of wan22-export and wan22-lora: the numbers are the averages."""

from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from export_runs import ALL, ALPHA, RANK, draw_adapter, write_full_run, write_lora_run
from tiny_run import keep_programs

from convert import export, lora_tools
from convert.weights import convert
from wan22_jax.adapter import Adapter, load_adapter
from wan22_jax.adapter_targets import LoRATarget
from wan22_jax.lora_names import DIALECTS
from wan22_jax.model_tensors import (
    FolderTensors,
    MergedTensors,
    Tensors,
    adapter_delta,
    stacked_weight_shapes,
)
from wan22_jax.tensor_files import SafetensorsFiles
from wan22_jax.weights import name_tensors, stored_dtype, transformer_names

BLOCK = "blocks.1.ffn.0.weight"


class Runs(NamedTuple):
    model: Path
    lora: Path
    raw: Adapter
    average: Adapter
    full: Path
    averages: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def runs(official, tmp_path_factory):
    """A run of a LoRA and one of all weights, whose averages are far from the weights."""
    folder = tmp_path_factory.mktemp("averaged")
    with keep_programs(folder / "programs"):
        model = folder / "model"
        convert(official, model)
        base, rng = FolderTensors(model), np.random.default_rng(3)
        shapes, targets = stacked_weight_shapes(base), dict.fromkeys(ALL, LoRATarget(RANK, ALPHA))
        average = draw_adapter(shapes, targets, seed=9)
        raw = write_lora_run(
            folder / "lora", model, ckpt_path=folder / "gone", averages=average.matrices
        )
        averages = {
            name: (base.read(name) + 0.1 * rng.normal(size=shape)).astype(np.float32)
            for name, shape in base.shapes.items()
        }
        write_full_run(folder / "full", model, ckpt_path=folder / "gone", averages=averages)
        yield Runs(model, folder / "lora", raw, average, folder / "full", averages)


def run(command, *words: object) -> None:
    assert command.main([str(word) for word in words]) == 0


def open_file(path: Path) -> Tensors:
    return name_tensors(SafetensorsFiles(path), "transformer", transformer_names())


def assert_rounded(found: Tensors, wanted: dict[str, np.ndarray]) -> None:
    assert found.shapes.keys() == wanted.keys()
    for name, array in wanted.items():
        kept_as = stored_dtype(name, "bfloat16")
        np.testing.assert_array_equal(found.read(name), array.astype(kept_as), err_msg=name)


def assert_average(adapter: Adapter, runs: Runs, *, dtype: str = "float32") -> None:
    for name, matrix in runs.average.matrices.items():
        np.testing.assert_array_equal(adapter.matrices[name], matrix.astype(dtype), err_msg=name)
        assert not np.array_equal(matrix, runs.raw.matrices[name])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_lora_in_each_dialect(dialect, runs, tmp_path):
    out = tmp_path / "lora.safetensors"
    run(export, "--checkpoint", runs.lora, "--ema", "--format", dialect, "--out", out)
    assert_average(load_adapter(out), runs, dtype=ml_dtypes.bfloat16)
    run(lora_tools, "convert", "--lora", runs.lora, "--ema", "--format", dialect, "--out",
        out, "--overwrite", "--dtype", "float32")  # fmt: skip
    assert_average(load_adapter(out), runs)


@pytest.mark.long
def test_a_lora_that_is_merged_while_it_is_exported(runs, tmp_path):
    merged = MergedTensors(FolderTensors(runs.model), [(runs.average, 1.0)])
    wanted = {name: merged.read(name) for name in merged.shapes}
    words = ("--checkpoint", runs.lora, "--model", runs.model, "--merge", "--ema", "--out")
    run(export, *words, tmp_path / "one.safetensors")
    assert_rounded(open_file(tmp_path / "one.safetensors"), wanted)
    words = ("merge", "--model", runs.model, "--lora", runs.lora, "--ema", "--out")
    run(lora_tools, *words, tmp_path / "other.safetensors")
    assert_rounded(open_file(tmp_path / "other.safetensors"), wanted)


def test_loras_that_are_resized_and_added_up(runs, tmp_path):
    wanted = adapter_delta(runs.average, BLOCK)
    assert wanted is not None
    words = ("--lora", runs.lora, "--ema", "--dtype", "float32", "--out")
    run(lora_tools, "resize", "--rank", RANK, *words, tmp_path / "same.safetensors")
    run(lora_tools, "merge", "--lora", f"{runs.lora}:-1", *words, tmp_path / "none.safetensors")
    same, none = (load_adapter(tmp_path / f"{name}.safetensors") for name in ("same", "none"))
    np.testing.assert_allclose(adapter_delta(same, BLOCK), wanted, atol=1e-5)
    np.testing.assert_allclose(adapter_delta(none, BLOCK), 0 * wanted, atol=1e-5)


def test_all_weights_as_one_file(runs, tmp_path):
    words = ("--checkpoint", runs.full, "--ema", "--format")
    run(export, *words, "official", "--out", tmp_path / "one.safetensors")
    assert_rounded(open_file(tmp_path / "one.safetensors"), runs.averages)
    run(export, *words, "fp8_scaled", "--out", tmp_path / "scaled.safetensors")
    scaled = open_file(tmp_path / "scaled.safetensors")
    for name, wanted in runs.averages.items():
        error = np.linalg.norm(np.asarray(scaled.read(name), np.float32) - wanted)
        assert error <= 0.04 * np.linalg.norm(wanted), name


@pytest.mark.long
def test_all_weights_as_a_folder(runs, tmp_path):
    words = ("--checkpoint", runs.full, "--ema", "--model", runs.model, "--format")
    run(export, *words, "diffusers", "--out", tmp_path / "diffusers")
    assert_rounded(open_file(tmp_path / "diffusers" / "transformer"), runs.averages)
    run(export, *words, "model", "--out", tmp_path / "model")
    assert_rounded(FolderTensors(tmp_path / "model"), runs.averages)


@pytest.mark.parametrize("words", [["convert"], ["resize", "--rank", "2"], ["merge"]])
def test_without_averages_ema_is_refused(words, runs, tmp_path, capsys):
    write_lora_run(tmp_path / "run", runs.model, ckpt_path=tmp_path / "gone")
    (tmp_path / "a.safetensors").touch()
    for lora, complaint in (
        (tmp_path / "run", "holds no average, ema_decay was not set; leave --ema out"),
        (tmp_path / "a.safetensors", "a.safetensors: --ema is of training runs, a file holds one"),
    ):
        flags = ["--lora", str(lora), "--ema", "--out", str(tmp_path / "out.safetensors")]
        assert lora_tools.main([*words, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert complaint in line
