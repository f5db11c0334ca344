"""wan22-sample --lora: a checkpoint and what is exported of it make the same video."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from export_runs import write_lora_run
from tiny_run import keep_programs

from convert import export
from convert.weights import convert
from wan22_jax import sample, videos
from wan22_jax.lora_names import DIALECTS

PROMPT = "a cat"


@pytest.fixture(scope="module")
def folder(official, tmp_path_factory):
    """A model, a run with a LoRA on it, and what is exported of it in every dialect."""
    folder = tmp_path_factory.mktemp("loras")
    with keep_programs(folder / "programs"):
        convert(official, folder / "model")
        run_dir = folder / "lora_run"
        # Where the run does not find its model, the exports cost no forward pass.
        write_lora_run(run_dir, folder / "model", ckpt_path=folder / "gone")
        for dialect in DIALECTS:
            words = ["--checkpoint", run_dir, "--format", dialect, "--dtype", "float32"]
            words += ["--out", folder / f"{dialect}.safetensors"]
            assert export.main([str(word) for word in words]) == 0
        yield folder


def make_video(folder: Path, out: Path, *flags: object) -> tuple[np.ndarray, np.ndarray]:
    """Runs the command; returns the latents that it decodes and the frames of its file."""
    latents = []

    def record(*arguments, **options):
        latents.append(original(*arguments, **options))
        return latents[-1]

    words = ["--model", folder / "model", "--prompt", PROMPT, "--width", 64, "--height", 32]
    words += ["--frames", 5, "--steps", 2, "--seed", 3, "--out", out, *flags]
    original = videos.sample_latents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(videos, "sample_latents", record)
        patch.setattr(sys, "argv", ["wan22-sample", *map(str, words)])
        assert sample.main() == 0
    with av.open(str(out)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    (found,) = latents
    return np.asarray(found), np.stack(frames)


@pytest.mark.long
def test_a_lora_is_the_same_from_everywhere(folder, tmp_path):
    plain, _ = make_video(folder, tmp_path / "plain.mp4")
    checkpoint = folder / "lora_run" / "checkpoints" / "7"
    wanted, wanted_frames = make_video(folder, tmp_path / "run.mp4", "--lora", checkpoint)
    assert wanted.shape == (1, 2, 2, 4, 48)
    assert wanted_frames.shape == (5, 32, 64, 3)
    assert np.isfinite(wanted).all()
    assert np.linalg.norm(wanted - plain) > 0.01 * np.linalg.norm(plain)
    for dialect in DIALECTS:
        lora = folder / f"{dialect}.safetensors"
        found, frames = make_video(folder, tmp_path / f"{dialect}.mp4", "--lora", lora)
        assert found.tobytes() == wanted.tobytes(), dialect
        np.testing.assert_array_equal(frames, wanted_frames, err_msg=dialect)


def test_a_lora_that_is_none_is_refused_by_name(folder, tmp_path, monkeypatch, capsys):
    words = ["--model", folder / "model", "--prompt", PROMPT, "--out", tmp_path / "a.mp4"]
    words += ["--width", 64, "--height", 32, "--frames", 5, "--lora", tmp_path / "gone"]
    monkeypatch.setattr(sys, "argv", ["wan22-sample", *map(str, words)])
    assert sample.main() == 2
    assert f"error: {tmp_path / 'gone'}: no such file" in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()
