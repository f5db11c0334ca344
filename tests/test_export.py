"""Adapters in and out: alpha is never the rank and B never zero, so a lost scale would show."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

from convert import export
from convert.export import export_adapter
from wan22_jax import adapter_file
from wan22_jax.adapter import (
    TARGETS,
    Adapter,
    attach_adapter,
    from_tensors,
    load_adapter,
    to_tensors,
)
from wan22_jax.adapter_file import write_adapter
from wan22_jax.checkpoint import open_checkpoints
from wan22_jax.errors import BadInput
from wan22_jax.lora_names import Dialect
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.training.step import TrainState, split_model

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=3, in_channels=4, out_channels=4, text_dim=8,
    text_len=5, freq_dim=16,
)  # fmt: skip
RANK, ALPHA = 4, 6.0
DIGEST = "a" * 64


def make_matrices(*, dim: int, ffn_dim: int, num_layers: int, rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = dict.fromkeys(TARGETS, (dim, dim)) | {"ffn.0": (ffn_dim, dim), "ffn.2": (dim, ffn_dim)}
    matrices = {}
    for target, (num_out, num_in) in sizes.items():
        shapes = {"lora_A": (num_layers, rank, num_in), "lora_B": (num_layers, num_out, rank)}
        for side, shape in shapes.items():
            matrix = rng.normal(size=shape).astype(np.float32)
            matrices[f"blocks.{target}.{side}"] = matrix
    return matrices


def make_adapter(**changes: object) -> Adapter:
    matrices = make_matrices(dim=24, ffn_dim=40, num_layers=3, rank=RANK)
    alphas = dict.fromkeys(TARGETS, ALPHA)
    return replace(Adapter(matrices, alphas, {"format": "pt"}, source="mine"), **changes)


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return WanTransformer(CONFIG, rngs=nnx.Rngs(0))


def predict(model: WanTransformer) -> np.ndarray:
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.normal(size=(1, 2, 4, 4, 4)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(1, 3, 8)), jnp.float32)
    return np.asarray(model(latents, jnp.full((1, 2), 0.4), text))


@pytest.fixture(scope="module")
def trained(model: WanTransformer) -> WanTransformer:
    """A model with a live adapter, as training leaves it: alpha != rank and B != 0."""
    live = nnx.clone(model)
    matrices = make_matrices(dim=24, ffn_dim=40, num_layers=3, rank=RANK)
    live.add_lora(jax.random.key(2), rank=RANK, alpha=ALPHA)
    for path, linear in live.lora_targets():
        assert linear.lora_B is not None
        linear.lora_B[...] = jnp.asarray(matrices[f"{path}.lora_B"])
    return live


@pytest.fixture(scope="module")
def base_velocity(model: WanTransformer) -> np.ndarray:
    return predict(model)


@pytest.fixture(scope="module")
def trained_velocity(trained: WanTransformer) -> np.ndarray:
    return predict(trained)


@pytest.fixture(scope="module")
def run_dir(trained: WanTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of step 3 (zero adapter) and step 7 (the trained one)."""
    run_dir = tmp_path_factory.mktemp("run")
    _, trainable, _ = split_model(trained)
    meta = {"rank": RANK, "alpha": ALPHA, "base_digest": DIGEST, "seed": 0}
    meta["config"] = {"adapter": {"dtype": "float16", "rank": RANK}}
    with open_checkpoints(run_dir) as manager:
        for step, factor in ((3, 0.0), (7, 1.0)):
            state = jax.tree.map(lambda x, factor=factor: x * factor, trainable)
            opt_state = optax.sgd(1.0, momentum=0.9).init(state)
            manager.save(TrainState(jnp.int32(step), state, opt_state), meta)
    return run_dir


def test_names_are_the_600_of_comfyui():
    matrices = make_matrices(dim=2, ffn_dim=3, num_layers=30, rank=1)
    tensors = to_tensors(Adapter(matrices, dict.fromkeys(TARGETS, 1.0), {}, source="mine"))
    attention = [f"{a}.{n}" for a in ("self_attn", "cross_attn") for n in ("q", "k", "v", "o")]
    assert set(tensors) == {
        f"diffusion_model.blocks.{layer}.{target}.lora_{side}.weight"
        for layer in range(30)
        for target in [*attention, "ffn.0", "ffn.2"]
        for side in ("A", "B")
    }
    assert len(tensors) == 600
    assert tensors["diffusion_model.blocks.29.ffn.0.lora_A.weight"].shape == (1, 2)
    assert tensors["diffusion_model.blocks.29.ffn.0.lora_B.weight"].shape == (3, 1)


def test_targets_are_the_linears_of_the_blocks(model: WanTransformer):
    assert {path for path, _ in model.lora_targets()} == {f"blocks.{t}" for t in TARGETS}


def test_alpha_is_written_exactly_when_it_is_not_the_rank():
    def alphas(adapter: Adapter) -> dict[str, np.ndarray]:
        return {name: a for name, a in to_tensors(adapter).items() if name.endswith(".alpha")}

    assert not alphas(make_adapter(alphas=dict.fromkeys(TARGETS, float(RANK))))
    written = alphas(make_adapter())
    assert set(written) == {
        f"diffusion_model.blocks.{i}.{target}.alpha" for i in range(3) for target in TARGETS
    }
    assert all(a.shape == () and a.dtype == np.float32 and a == ALPHA for a in written.values())


@pytest.mark.parametrize("alpha", [ALPHA, float(RANK)])
def test_names_are_a_bijection(alpha: float):
    adapter = make_adapter(alphas=dict.fromkeys(TARGETS, alpha))
    back = from_tensors(to_tensors(adapter), metadata=adapter.metadata, source="file")
    assert (back.ranks, back.alphas) == (dict.fromkeys(TARGETS, RANK), adapter.alphas)
    assert back.metadata == {"format": "pt"}
    assert back.matrices.keys() == adapter.matrices.keys()
    for name, matrix in adapter.matrices.items():
        np.testing.assert_array_equal(back.matrices[name], matrix)


@pytest.mark.parametrize("source", ["run", "file"])
def test_attached_adapter_computes_what_the_live_one_did(
    source: str,
    model: WanTransformer,
    base_velocity: np.ndarray,
    trained_velocity: np.ndarray,
    run_dir: Path,
    tmp_path: Path,
):
    path = run_dir
    if source == "file":
        path = tmp_path / "lora.safetensors"
        export_adapter(run_dir, path, dtype="float32", base_digest=DIGEST)
    loaded = nnx.clone(model)
    attach_adapter(loaded, load_adapter(path, base_digest=DIGEST))
    velocity = predict(loaded)
    np.testing.assert_array_equal(velocity, trained_velocity)
    assert np.abs(velocity - base_velocity).max() > 1e-2


def test_strength_scales_the_adapter_and_attaching_again_replaces_it(
    model: WanTransformer, trained: WanTransformer, trained_velocity: np.ndarray, run_dir: Path
):
    adapter = load_adapter(run_dir)
    loaded = nnx.clone(model)
    attach_adapter(loaded, adapter, strength=0.5)
    halved = nnx.clone(trained)
    for _, linear in halved.lora_targets():
        assert linear.lora_scale == ALPHA / RANK
        linear.lora_scale = 0.5 * linear.lora_scale
    velocity = predict(loaded)
    np.testing.assert_array_equal(velocity, predict(halved))
    assert np.abs(velocity - trained_velocity).max() > 1e-2
    only_q = {name: m for name, m in adapter.matrices.items() if ".self_attn.q." in name}
    attach_adapter(loaded, replace(adapter, matrices=only_q, alphas={"self_attn.q": ALPHA}))
    adapted = [path for path, linear in loaded.lora_targets() if linear.lora_A is not None]
    assert adapted == ["blocks.self_attn.q"]


@pytest.mark.parametrize(
    ("dtype", "stored"), [(None, "float16"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_export_writes_the_newest_checkpoint_in_the_configured_dtype(
    dtype: str | None, stored: str, trained: WanTransformer, run_dir: Path, tmp_path: Path
):
    out = tmp_path / "new" / "lora.safetensors"
    export_adapter(run_dir, out, dtype=dtype)
    tensors = safetensors.numpy.load_file(out)
    live = dict(trained.lora_targets())["blocks.cross_attn.v"].lora_B
    assert live is not None
    wanted = np.asarray(live[...])[2].astype(jnp.dtype(stored))
    tensor = tensors["diffusion_model.blocks.2.cross_attn.v.lora_B.weight"]
    assert tensor.dtype == wanted.dtype
    np.testing.assert_array_equal(tensor, wanted)
    metadata = load_adapter(out).metadata
    config = json.loads(metadata.pop("config"))
    assert config["adapter"]["dtype"] == "float16"
    toml = b'[adapter]\ndtype = "float16"\nrank = 4\n'
    assert metadata.pop("config_digest") == hashlib.sha256(toml).hexdigest()
    assert json.loads(metadata.pop("targets")) == list(TARGETS)
    assert metadata == {
        "format": "pt",
        "base_model": "Wan2.2-TI2V-5B",
        "base_digest": DIGEST,
        "rank": "4",
        "alpha": "6.0",
        "step": "7",
    }
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_export_of_a_chosen_step(run_dir: Path, tmp_path: Path):
    chosen = export_adapter(run_dir, tmp_path / "a.safetensors", step=3).adapter
    assert chosen.metadata["step"] == "3"
    assert not any(matrix.any() for matrix in chosen.matrices.values())
    newest = export_adapter(run_dir / "checkpoints" / "7", tmp_path / "b.safetensors").adapter
    assert newest.metadata["step"] == "7"
    assert all(matrix.any() for matrix in newest.matrices.values())


def test_existing_file_is_replaced_only_when_told(run_dir: Path, tmp_path: Path):
    out = tmp_path / "lora.safetensors"
    out.write_text("precious")
    with pytest.raises(BadInput, match=r"lora\.safetensors: exists already.*--overwrite"):
        export_adapter(run_dir, out)
    assert out.read_text() == "precious"
    export_adapter(run_dir, out, overwrite=True)
    assert load_adapter(out).ranks["ffn.0"] == RANK


def test_other_base_model_is_refused(run_dir: Path, tmp_path: Path):
    other = "b" * 64
    with pytest.raises(BadInput, match=f"run.*{DIGEST}.*{other}"):
        export_adapter(run_dir, tmp_path / "lora.safetensors", base_digest=other)
    assert not list(tmp_path.iterdir())
    export_adapter(run_dir, tmp_path / "lora.safetensors")
    with pytest.raises(BadInput, match=rf"lora\.safetensors.*{DIGEST}.*{other}"):
        load_adapter(tmp_path / "lora.safetensors", base_digest=other)
    write_adapter(make_adapter(), tmp_path / "stranger.safetensors")
    assert (
        load_adapter(tmp_path / "stranger.safetensors", base_digest=other).alphas["ffn.0"] == ALPHA
    )


def test_values_that_do_not_fit_the_dtype_are_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "lora.safetensors"
    for value, reason in ((1e6, "beyond float16"), (np.nan, "NaN.*--step")):
        adapter = load_adapter(run_dir)
        adapter.matrices["blocks.ffn.2.lora_A"] = adapter.matrices["blocks.ffn.2.lora_A"].copy()
        adapter.matrices["blocks.ffn.2.lora_A"][1, 0, 0] = value
        monkeypatch.setattr(export, "load_adapter", lambda *_, a=adapter, **__: a)
        with pytest.raises(BadInput, match=rf"blocks\.ffn\.2\.lora_A.*{reason}"):
            export_adapter(run_dir, out, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_file_that_reads_back_differently_is_not_kept(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def write_flipped(adapter: Adapter, path: Path, dialect: Dialect) -> None:
        write_adapter(adapter, path, dialect)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(adapter_file, "write_adapter", write_flipped)
    with pytest.raises(BadInput, match="reads back differently"):
        export_adapter(run_dir, tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def fill(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_file.os, "fsync", fill)
    out = tmp_path / "lora.safetensors"
    assert export.main(["--checkpoint", str(run_dir), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the disk is full while writing" in line
    assert out.name in line
    assert not list(tmp_path.iterdir())


def test_a_kill_before_the_rename_leaves_no_file_of_that_name(run_dir: Path, tmp_path: Path):
    out = tmp_path / "lora.safetensors"
    script = (
        "import os, signal, sys; from pathlib import Path; import convert.export as export\n"
        "from wan22_jax import adapter_file as file\n"
        "file._check_equal = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.export_adapter(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, str(run_dir), str(out)],
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".lora.safetensors.partial"]
    export_adapter(run_dir, out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int, value: float = 1.0):
    return lambda tensors: tensors.update({name: np.full(shape, value, np.float32)})


Q0 = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{Q0}.lora_B.weight"), r"incomplete.*missing: blocks\.0\.self_attn\.q\.lora_B$"),
        (drop(f"{Q0}.alpha"), r"missing: blocks\.0\.self_attn\.q\.alpha$"),
        (put("diffusion_model.blocks.3.ffn.0.lora_A.weight", 4, 24), "missing: .* and 21 more"),
        (put("diffusion_model.blocks.00.ffn.0.alpha"), r"unknown: diffusion_model\.blocks\.00\."),
        (
            put("lora_unet_blocks_0_self_attn_q.alpha"),
            "of two makers, .* and lora_unet_blocks_0_self",
        ),
        (put("lora_unet_blocks_0_attn1_q.alpha"), "unknown: lora_unet_blocks_0_attn1_q"),
        (put("diffusion_model.head.head.lora_A.weight"), r"unknown: diffusion_model\.head\.head"),
        (
            put("diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", 4, 5120),
            r"of Wan2\.1 or Wan2\.2 14B, .*unknown: .*k_img\.lora_A\.weight \[4, 5120\]",
        ),
        (put(f"{Q0}.lora_A.weight", 5, 24), r"self_attn\.q\.lora_A: matrices alike"),
        (put(f"{Q0}.alpha", value=7), r"one alpha.*of self_attn\.q .*\[6\.0, 7\.0\]"),
        (put(f"{Q0}.lora_B.weight"), r"self_attn\.q\.lora_B: matrices alike"),
        (lambda tensors: tensors.clear(), "holds no tensors"),
    ],
)
def test_strange_files_are_refused_by_name(change, message: str, tmp_path: Path):
    tensors = to_tensors(make_adapter())
    change(tensors)
    path = tmp_path / "strange.safetensors"
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(BadInput, match=rf"strange\.safetensors.*{message}"):
        load_adapter(path)


def test_two_ranks_of_one_linear_are_refused(tmp_path: Path):
    matrices = make_adapter().matrices
    matrices["blocks.ffn.0.lora_A"] = np.ones((3, 5, 24), np.float32)
    path = tmp_path / "lora.safetensors"
    write_adapter(make_adapter(matrices=matrices), path)
    with pytest.raises(BadInput, match=r"one rank .* at ffn\.0, lora_A is \[5, 24\] and lora_B is"):
        load_adapter(path)


def test_truncated_and_absent_files_are_refused(tmp_path: Path):
    path = tmp_path / "lora.safetensors"
    with pytest.raises(BadInput, match=r"lora\.safetensors: no such file"):
        load_adapter(path)
    write_adapter(make_adapter(), path)
    content = path.read_bytes()
    for length in (0, 5, 300, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(
            BadInput, match=r"lora\.safetensors: a complete safetensors file was expected"
        ):
            load_adapter(path)


@pytest.mark.parametrize("num_layers", [2, 4])
def test_adapter_of_another_size_is_not_attached(num_layers: int, model: WanTransformer):
    matrices = make_matrices(dim=24, ffn_dim=48, num_layers=num_layers, rank=RANK)
    target = nnx.clone(model)
    with pytest.raises(
        BadInput, match=rf"mine: .*blocks\.ffn\.0\.lora_B is \[{num_layers}, 48, 4\]"
    ):
        attach_adapter(
            target,
            make_adapter(
                matrices={n: m for n, m in matrices.items() if ".ffn.0" in n},
                alphas={"ffn.0": ALPHA},
            ),
        )
    assert dict(target.lora_targets())["blocks.ffn.0"].lora_A is None


def test_command_reports_one_line(run_dir: Path, tmp_path: Path, capsys):
    out = tmp_path / "lora.safetensors"
    command = ["--checkpoint", str(run_dir), "--out", str(out)]
    assert export.main(command) == 0
    assert export.main(command) == 2
    assert export.main([*command, "--overwrite", "--step", "5"]) == 2
    captured = capsys.readouterr()
    assert f"wrote {out}: 90 tensors, float16, rank 4, alpha 6, step 7" in captured.out
    exists, no_step = captured.err.splitlines()
    assert "exists already" in exists
    assert "no checkpoint of step 5" in no_step
