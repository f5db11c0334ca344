"""wan22-train --status and --report: they tell what the folder holds, and need nothing else."""

import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan22_jax import train
from wan22_jax.charts import Line, draw_chart, smooth
from wan22_jax.data.video_file import write_video
from wan22_jax.run_summary import measure_trend, read_run
from wan22_jax.training.events import Curve, EventLog, Session
from wan22_jax.training.status import FILE, Status, write_status

NAME = "20261126_03-12-45"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of two sessions, 40 steps, that goes on."""
    folder = tmp_path / "runs" / NAME
    folder.mkdir(parents=True)
    for first, last, changes in ((0, 30, ()), (20, 40, ("optimizer.lr 1 -> 2", "a <b> -> c"))):
        log = EventLog(folder, Session(1.8e9, first, first // 10 + 1, 0, changes, "lr = 1 # <x>\n"))
        for step in range(first + 1, last + 1):
            loss = 1.0 / step
            values = {"loss": loss, "lr": 1e-4, "grad_norm": 1.0, "loss_t2v": loss}
            values |= {"loss_sigma_0.3-0.4": loss, "step_time_s": 0.1}
            log.write({f"train/{name}": value for name, value in values.items()}, step)
            if step % 10 == 0:
                log.write_epoch(loss, step // 10)
                log.write({"pets/loss": loss, "pets/loss_quantile_0.10": loss / 2}, step)
        log.close()
    for step in (9, 20, 40):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "data").write_bytes(b"0" * 2_000_000)
    (folder / "checkpoints" / "50.orbax-checkpoint-tmp").mkdir()
    (folder / "epoch2").mkdir()
    (folder / "epoch2" / "adapter_model.safetensors").write_bytes(b"0")
    numbers = (0.025, 0.03, 1e-4, 0.1, 10.0, 2304.0, 300.0, 13.8, "H100")
    write_status(folder, Status("running", 40, 60, 4, 6, *numbers))
    return folder


def show(*words: str) -> int:
    return train.main(list(words))


def test_the_status_of_a_run_in_progress(run_dir, capsys):
    assert show("--status", str(run_dir)) == 0
    said = capsys.readouterr().out
    lines = [line.split(maxsplit=1) for line in said.splitlines()]
    rows = {name: [text for other, text in lines if other == name] for name, _ in lines}
    assert re.match(rf"running as process {os.getpid()} on \S+, last sign of life", *rows["state"])
    assert rows["step"] == ["40 of 60 (66.7%), epoch 4 of 6"]
    assert rows["loss"][0].startswith("0.0250 now, 0.0300 smoothed, trend -")
    assert rows["loss"][1] == "epoch 1: 0.1000, epoch 2: 0.0500, epoch 3: 0.0333, epoch 4: 0.0250"
    assert rows["loss"][2] == "pets/loss: 0.0250 at step 40, best 0.0250 at step 40"
    assert rows["speed"] == ["0.100 s/step, 10 samples/s, 2,304 tokens/s, 300 model TFLOP/s"]
    assert rows["ETA"][0].startswith("0:00:02, at ")
    assert rows["memory"] == ["peak 13.8 GB on H100"]
    assert re.fullmatch(r"step 40, \d s ago, 2\.0 MB; 2 more", rows["checkpoint"][0])
    assert rows["exported"] == ["epoch2/adapter_model.safetensors"]
    (resumed,) = rows["resumed"]
    assert resumed.startswith("after step 20, 2027-01-15")
    assert resumed.endswith("optimizer.lr 1 -> 2; a <b> -> c")
    assert re.fullmatch(r"sha256 [0-9a-f]{12}", *rows["config"])


def change_status(run_dir: Path, **fields) -> None:
    path = run_dir / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_state_tells_alive_from_dead(run_dir, capsys):
    for fields, expected in (
        ({"process_started": "1"}, r"state +dead: process \d+ on \S+ is gone without a word"),
        ({"host": "other"}, r"running as process \d+ on other when last heard of, .* ago\n"),
        ({"host": "other", "written_at": time.time() - 999}, "ago; it may be dead, or compile"),
        ({"state": "failed: a reason"}, r"state +failed: a reason, 0:16:39 ago"),
        ({"state": "done", "written_at": time.time()}, r"state +done, \d s ago"),
    ):
        change_status(run_dir, **fields)
        assert show("--status", str(run_dir)) == 0
        said = capsys.readouterr().out
        assert re.search(expected, said)
    assert "ETA" not in said


@pytest.mark.usefixtures("run_dir")
def test_the_newest_run_of_a_config_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "output_dir = 'runs'\ndataset = 'd.toml'\nepochs = 1\n[model]\nckpt_path = 'm'\n"
    Path("lora.toml").write_text(text + "[adapter]\n")
    (tmp_path / "runs" / "99999999_no_run").mkdir()
    for words in (["--config", "lora.toml", "--status"], ["--status", NAME, "--config=lora.toml"]):
        assert show(*words) == 0
        assert f"runs/{NAME}" in capsys.readouterr().out
    assert show("--config", "lora.toml", "output_dir=none", "--status") == 2
    assert "none: holds no run yet" in capsys.readouterr().err


@pytest.mark.usefixtures("run_dir")
def test_what_is_no_run_is_refused(tmp_path, capsys):
    for words, expected in (
        (["--status", str(tmp_path)], "is not a run folder of wan22-train"),
        (["--report", str(tmp_path / "nothing")], "there is no such folder"),
        (["--status"], "name a run folder, or give --config"),
    ):
        assert show(*words) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        show()
    assert "--config is needed to train" in capsys.readouterr().err


def test_looking_never_starts_jax(run_dir):
    words = [sys.executable, "-m", "wan22_jax.train", "--status", str(run_dir), "--report"]
    root = str(Path(train.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    # Any use of a device would fail: there is no such platform.
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "nonsense"}
    words[-1:] = ["--report", str(run_dir)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "40 of 60" in done.stdout
    assert (run_dir / "report.html").stat().st_size > 1000


def test_the_report_holds_all_that_the_run_has(run_dir, capsys):
    samples = run_dir / "samples" / "step40"
    samples.mkdir(parents=True)
    frames_TYX3 = np.full((5, 32, 48, 3), 200, np.uint8)
    write_video(samples / "dog.mp4", [frames_TYX3], width_px=48, height_px=32)
    Image.fromarray(frames_TYX3[0]).save(samples / "cat & mouse.png")
    (samples / "prompts.txt").write_text("no picture")
    assert show("--report", str(run_dir)) == 0
    out = run_dir / "report.html"
    assert str(out) in capsys.readouterr().out
    page = out.read_text()
    for text in (NAME, "40 of 60", "Loss by task", "0.3-0.4", "pets, by noise level", "13.8"):
        assert text in page
    for title in ("Learning rate", "Norm of the gradient", "Seconds a step", "Loss of an epoch"):
        assert f"<figcaption>{title}" in page
    assert "Peak device memory" not in page  # nothing was logged of it
    assert "a &lt;b&gt; -&gt; c" in page
    assert "lr = 1 # &lt;x&gt;" in page
    assert page.count("<img") == page.count('src="data:image/jpeg;base64,') == 2
    assert 'href="samples/step40/dog.mp4"' in page
    assert "cat &amp; mouse.png" in page
    assert "checkpoints/40" in page
    assert "orbax-checkpoint-tmp" not in page
    assert not re.search(r"(src|href)=.?https?:|@import|<script|<link", page)  # stands alone
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)
        assert "nan" not in svg
        assert 'class="resume"' in svg or "epoch</text>" in svg
    other = run_dir.parent / "other.html"
    assert show("--report", str(run_dir), "--out", str(other)) == 0
    assert f'href="{NAME}/samples/step40/dog.mp4"' in other.read_text()


def test_an_empty_run_has_a_status_and_a_report(tmp_path, capsys):
    EventLog(tmp_path, Session(0.0, 0, 1, 0, (), "")).close()
    assert show("--status", str(tmp_path), "--report", str(tmp_path)) == 0
    assert "not known (a run of an earlier version)" in capsys.readouterr().out
    assert read_run(tmp_path).curves == {}


def test_a_long_curve_takes_no_more_points_than_pixels():
    rng = np.random.default_rng(0)
    curve = Curve(np.arange(100_000), rng.random(100_000))
    curve.values_N[777] = 50.0
    svg = draw_chart("x", [Line("x", curve, smooth=False)])
    (points,) = re.findall(r'class="line"[^>]* d="M([^"]*)"', svg)
    assert 100 < points.count("L") <= 600
    assert len(svg) < 20_000


def test_a_spike_does_not_flatten_the_rest():
    values_N = np.linspace(1, 0.5, 1000)
    values_N[500] = 1e6
    svg = draw_chart("x", [Line("x", Curve(np.arange(1000), values_N))])
    labels = [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)</text>', svg)]
    assert len(labels) >= 3
    assert max(labels) < 1e6


def test_curves_of_any_kind_are_drawn():
    for values in ([1.0], [0.0, 0.0], [np.nan, 2.0], [1e-9, 1.1e-9], [-5.0, 5e8]):
        svg = draw_chart("x", [Line("x", Curve(np.arange(len(values)), np.array(values)))])
        assert "nan" not in svg
        assert 'class="line"' in svg
    assert draw_chart("x", [Line("x", Curve(np.array([1]), np.array([np.inf])))]) == ""
    assert draw_chart("x", []) == ""


def test_smoothing_and_trend():
    curve = Curve(np.arange(50), np.full(50, 3.0))
    np.testing.assert_allclose(smooth(curve, 10.0).values_N, 3.0)  # not pulled to 0 at the start
    steps_N = np.arange(200)
    falling = Curve(steps_N, np.where(steps_N < 100, 2.0, 1.0))
    assert measure_trend(falling) == (pytest.approx(-0.5), 200)
    assert measure_trend(Curve(steps_N[:5], steps_N[:5] * 1.0)) is None
