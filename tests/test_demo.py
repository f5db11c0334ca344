"""The demo's inputs are what a user has, and a command that fails ends the demo by name."""

import json
import sysconfig
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from wan22_jax import demo
from wan22_jax.adapter import load_adapter
from wan22_jax.data.video import probe, read_clip
from wan22_jax.demo_checkpoint import (
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE,
    draw_weights,
    write_checkpoint,
)
from wan22_jax.demo_clips import write_clips
from wan22_jax.geometry import Bucket
from wan22_jax.model.umt5 import UMT5
from wan22_jax.model_folder import read_model_card
from wan22_jax.text import load_tokenizer, tokenize
from wan22_jax.weights import load_transformer, load_umt5, load_vae, parameter_shapes

CAPTIONS = ["A red circle moves right.", "A blue square moves left."]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_checkpoint(folder, captions=CAPTIONS)
    return folder


def test_checkpoint_has_the_files_of_the_release(checkpoint: Path):
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {
        "Wan2.2_VAE.safetensors",
        "config.json",
        "diffusion_pytorch_model-00001-of-00003.safetensors",
        "diffusion_pytorch_model-00002-of-00003.safetensors",
        "diffusion_pytorch_model-00003-of-00003.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "google/umt5-xxl/tokenizer.json",
        "google/umt5-xxl/tokenizer_config.json",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
    }
    index = json.loads((checkpoint / "diffusion_pytorch_model.safetensors.index.json").read_text())
    num_blocks, per_block, outside = TINY_TRANSFORMER.num_layers, 27, 15  # spec 1.1: 825 with 30
    assert len(index["weight_map"]) == num_blocks * per_block + outside


def test_checkpoint_loads_into_the_networks(checkpoint: Path, tmp_path: Path):
    for shard in checkpoint.glob("diffusion_pytorch_model*"):
        (tmp_path / shard.name).symlink_to(shard)
    transformer = load_transformer(tmp_path, TINY_TRANSFORMER)
    load_vae(checkpoint / "Wan2.2_VAE.safetensors", TINY_VAE)
    load_umt5(checkpoint / "models_t5_umt5-xxl-enc-bf16.safetensors", TINY_TEXT_ENCODER)
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(1, 2, 4, 4, 48)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(1, 3, TINY_TRANSFORMER.text_dim)), jnp.float32)
    velocity = transformer(latents, jnp.full((1, 2), 0.5), text)
    assert 0.1 < float(jnp.std(velocity)) < 10


def test_weights_follow_seed_and_name():
    module = nnx.eval_shape(lambda: UMT5(TINY_TEXT_ENCODER, rngs=nnx.Rngs(0)))
    weights, again, other = (draw_weights(module, seed=seed) for seed in (0, 0, 1))
    for name, shape in parameter_shapes(module).items():
        assert weights[name].shape == shape
        np.testing.assert_array_equal(weights[name], again[name])
        assert not np.array_equal(weights[name], other[name])
    assert len({weight.tobytes() for weight in weights.values()}) == len(weights)


def test_tokenizer_is_umt5s_kind(checkpoint: Path):
    tokenizer = load_tokenizer(checkpoint / "google" / "umt5-xxl")
    tokens, mask = tokenize(tokenizer, CAPTIONS)
    assert tokens.max() < TINY_TEXT_ENCODER.vocab_size
    assert (tokens[0][mask[0]] != tokens[1][mask[1]][: mask[0].sum()]).any()
    assert tokenizer.decode(tokens[0]) == CAPTIONS[0]


def test_clips_are_captioned_h264_of_several_kinds(tmp_path: Path):
    files = write_clips(tmp_path)
    assert sorted(files) == sorted(set(tmp_path.iterdir()) - set(tmp_path.glob("*.txt")))
    infos = {path: probe(path) for path in files}
    videos = [path for path, info in infos.items() if not info.is_image]
    assert (len(videos), len(files)) == (12, 14)
    assert len({(infos[path].width_px, infos[path].height_px) for path in videos}) == 3
    assert {float(infos[path].fps) for path in videos} == {16, 24, 30}
    for path in files:
        caption = path.with_suffix(".txt").read_text("utf-8").strip()
        assert f"A {path.stem.split('_')[0]} {path.stem.split('_')[1]} " in caption
    for path in videos:
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
        clip = read_clip(path, infos[path], Bucket(96, 96, 17)).astype(int)
        assert np.abs(clip[-1] - clip[0]).mean() > 5  # it moves


def install_fakes(folder: Path, monkeypatch: pytest.MonkeyPatch, *, failing: str) -> None:
    for name in ("wan22-convert", "wan22-cache", "wan22-train"):
        script = folder / name
        code = 3 if name == failing else 0
        script.write_text(f"#!/bin/sh\necho {name} >> {folder}/log\nexit {code}\n")
        script.chmod(0o755)
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda _: str(folder))


def test_a_failing_command_ends_the_demo_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    install_fakes(tmp_path, monkeypatch, failing="wan22-cache")
    assert demo.main(["--out", str(tmp_path / "demo")]) == 2
    captured = capfd.readouterr()
    assert captured.err == (
        "error: wan22-cache --config lora.toml: failed with exit code 3; see its message above\n"
    )
    assert "$ wan22-convert --ckpt_path checkpoint --out model\n" in captured.out
    assert "Everything works" not in captured.out
    assert (tmp_path / "log").read_text().split() == ["wan22-convert", "wan22-cache"]
    assert {"checkpoint", "clips", "lora.toml", "dataset.toml"} <= {
        path.name for path in (tmp_path / "demo").iterdir()
    }


def test_a_command_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda _: str(tmp_path))
    assert demo.main(["--out", str(tmp_path / "demo")]) == 2
    assert "wan22-convert: is not installed; run pip install" in capfd.readouterr().err


def test_only_an_earlier_demo_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    install_fakes(tmp_path, monkeypatch, failing="wan22-convert")
    out, strangers = tmp_path / "demo", tmp_path / "strangers"
    strangers.mkdir()
    (strangers / "thesis.txt").write_text("precious")
    demo.main(["--out", str(out)])
    (out / "model").mkdir()
    demo.main(["--out", str(out)])
    assert not (out / "model").exists()
    capfd.readouterr()
    assert demo.main(["--out", str(strangers)]) == 2
    assert "strangers: is not empty and no earlier demo" in capfd.readouterr().err
    assert (strangers / "thesis.txt").read_text() == "precious"


def test_contact_sheet_shows_first_and_last_frames(tmp_path: Path):
    write_clips(tmp_path)
    videos = [tmp_path / "red_circle.mp4", tmp_path / "blue_square.mp4"]
    demo.write_contact_sheet(tmp_path / "sheet.png", videos, columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert sheet.shape == (2 * 110, 3 * 96, 3)
    first, last = sheet[14:110, :96], sheet[14:110, 192:]
    assert np.abs(first - last).mean() > 5
    red_more_than_blue = [
        (row[..., 0] - row[..., 2]).mean() for row in (sheet[14:110], sheet[124:])
    ]
    assert red_more_than_blue[0] > 0 > red_more_than_blue[1]


@pytest.mark.slow
def test_the_whole_path_on_real_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Runs every installed command in its own process, as ``make demo`` does."""
    if not Path(sysconfig.get_path("scripts"), "wan22-train").is_file():
        pytest.skip("the console scripts are not installed (pip install -e .)")
    out = tmp_path / "demo"
    code = demo.main(["--out", str(out)])
    captured = capfd.readouterr()
    assert code == 0, captured.err
    assert "Everything works" in captured.out
    (run_dir,) = (out / "runs").iterdir()
    assert {"60", "84"} <= {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert "60 steps done, of 84" in captured.out  # resumed, not started again
    digest = read_model_card(out / "model").digests["transformer"]
    adapter = load_adapter(out / "lora.safetensors", base_digest=digest)
    assert (str(adapter), adapter.metadata["step"]) == ("rank 8, alpha 16", "84")
    assert all(matrix.any() for matrix in adapter.matrices.values())
    for name in ("text_to_video.mp4", "image_to_video.mp4"):
        info = probe(out / name)
        assert (info.width_px, info.height_px, info.frames, info.fps) == (96, 96, 17, 24)
    assert (out / "text_to_video.mp4").read_bytes() != (out / "image_to_video.mp4").read_bytes()
