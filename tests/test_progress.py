"""What a run says of itself: event files, the status file, the progress line, W&B."""

import json
import logging
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wan22_jax.config import dump_config, load_config
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket
from wan22_jax.model.transformer import TI2V_5B
from wan22_jax.monitoring import list_changes, open_progress
from wan22_jax.resuming import Start
from wan22_jax.training import metrics
from wan22_jax.training.events import EPOCH_LOSS, EventLog, Session, iterate_events, read_events
from wan22_jax.training.flops import count_flops
from wan22_jax.training.metrics import Progress, StepReport, describe_status, name_decile
from wan22_jax.training.status import FILE, Status, is_alive, read_status, write_status

BUCKET = Bucket(32, 32, 5)
START = Session(0.0, 0, 1, 0, (), "lr = 1\n[model]\nshift = 3\n")
PLAN = metrics.Plan(6, 2, 1, 1, TI2V_5B, np.full(6, 1e-4), False)
CONFIG = """
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 2
[model]
ckpt_path = 'model'
[adapter]
rank = 2
"""


def report(step: int, losses, *, sigmas=None, tasks=None, per_epoch: int = 3) -> StepReport:
    losses_AB = jnp.asarray(losses, jnp.float32)
    values = {
        "loss": losses_AB.mean(),
        "grad_norm": jnp.float32(step),
        "loss_AB": losses_AB,
        "sigma_AB": jnp.full_like(losses_AB, 0.5) if sigmas is None else jnp.asarray(sigmas),
        "task_AB": jnp.zeros(losses_AB.shape, int) if tasks is None else jnp.asarray(tasks),
    }
    clips = tuple(f"{number}.mp4" for number in range(losses_AB.size))
    epoch, ends = (step - 1) // per_epoch + 1, step % per_epoch == 0
    return StepReport(step, epoch, ends, BUCKET, values, clips)


def curves_of(run_dir: Path) -> dict[str, dict[int, float]]:
    _, curves = read_events(run_dir)
    return {
        name: dict(zip(curve.steps_N.tolist(), curve.values_N.tolist(), strict=True))
        for name, curve in curves.items()
    }


def test_losses_are_told_apart_by_task_and_noise_level(tmp_path):
    with Progress(tmp_path, START, PLAN) as progress:
        sigmas, tasks = [[0.05, 0.95], [0.97, 1.0]], [[0, 1], [1, 0]]
        first = report(1, [[1.0, 2.0], [4.0, 8.0]], sigmas=sigmas, tasks=tasks)
        progress.push(first, new_program=True)
        progress.push(report(2, [[16.0]], sigmas=[[0.5]]), new_program=False)
    curves = curves_of(tmp_path)
    assert curves["train/loss"] == {1: 3.75}  # the second one was never waited for
    assert curves["train/loss_t2v"] == {1: 4.5}
    assert curves["train/loss_i2v"] == {1: 3.0}
    assert curves["train/loss_sigma_0.0-0.1"] == {1: 1.0}
    assert curves["train/loss_sigma_0.9-1.0"] == {1: pytest.approx(14 / 3)}
    assert not [name for name in curves if "0.5-0.6" in name]


def test_deciles_span_zero_to_one():
    edges = [0.0, 0.0999, 0.1, 0.55, 0.9, 1.0]
    assert [name_decile(edge).removeprefix("loss_sigma_") for edge in edges] == [
        *("0.0-0.1", "0.0-0.1", "0.1-0.2", "0.5-0.6", "0.9-1.0", "0.9-1.0")
    ]


def test_what_is_not_logged_of_a_step_is_averaged_into_the_next(tmp_path):
    with Progress(tmp_path, START, PLAN._replace(logging_steps=2)) as progress:
        for step, loss in ((1, 1.0), (2, 3.0), (3, 7.0)):
            progress.push(report(step, [[loss]]), new_program=step == 1)
        progress.flush()
    curves = curves_of(tmp_path)
    assert curves["train/loss"] == {2: 3.0}
    assert curves["train/loss_t2v"] == {2: 2.0}
    assert curves[EPOCH_LOSS] == {1: pytest.approx(11 / 3)}


def test_curves_are_on_disk_while_the_run_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "FLUSH_S", 0)
    with Progress(tmp_path, START, PLAN) as progress:
        for step in (1, 2):
            progress.push(report(step, [[2.0]]), new_program=False)
        assert curves_of(tmp_path)["train/loss"] == {1: 2.0}


def test_speeds_belong_together(tmp_path):
    with Progress(tmp_path, START, PLAN) as progress:
        for step in (1, 2, 3):
            progress.push(report(step, [[1.0, 1.0]]), new_program=step == 1)
    curves = curves_of(tmp_path)
    ((step, seconds),) = curves["train/step_time_s"].items()
    assert step == 2  # the first one was compiled, the third one never waited for
    assert curves["train/samples_per_s"][2] == pytest.approx(2 / seconds, rel=1e-5)
    tokens = 2 * BUCKET.num_tokens
    assert curves["train/tokens_per_s"][2] == pytest.approx(tokens / seconds, rel=1e-5)
    flops = 2 * count_flops(TI2V_5B, BUCKET.num_tokens)
    assert curves["train/model_tflops"][2] == pytest.approx(flops / seconds / 1e12, rel=1e-5)


def test_a_step_is_read_while_the_next_one_runs():
    waited = []

    class Metric:
        ndim = 0

        def __init__(self, name: str):
            self.name = name

        def copy_to_host_async(self):
            waited.append(f"copy {self.name}")

        def block_until_ready(self):
            waited.append(f"wait {self.name}")
            return self

        def __array__(self, dtype=None, copy=None):
            waited.append(f"read {self.name}")
            return np.float32(1)

    def pending(step: int) -> StepReport:
        values = {"loss": Metric(f"loss {step}"), "grad_norm": Metric(f"norm {step}")}
        return StepReport(step, 1, False, BUCKET, values, ("a",))  # pyright: ignore

    progress = Progress.__new__(Progress)
    progress._pending = progress._pushed_at = None
    progress._finish = lambda report, _: waited.append(f"finish {report.step}")
    progress.push(pending(1), new_program=False)
    assert waited == ["copy loss 1", "copy norm 1"]  # and nothing is waited for
    progress.push(pending(2), new_program=False)
    assert waited[2:] == ["copy loss 2", "copy norm 2", "wait loss 1", "finish 1"]


def test_a_resumed_run_overwrites_what_the_checkpoint_undid(tmp_path):
    log = EventLog(tmp_path, START)
    for step in range(1, 9):
        log.write({"train/loss": float(step)}, step)
    log.write_epoch(1.5, 1)
    log.write_epoch(2.5, 2)
    log.close()
    again = Session(1.0, 5, 2, 0, ("lr 1 -> 2",), "lr = 2\n")
    log = EventLog(tmp_path, again)
    log.write({"train/loss": 60.0}, 6)
    log.close()
    sessions, _ = read_events(tmp_path)
    assert sessions == [START, again]
    curves = curves_of(tmp_path)
    assert curves["train/loss"] == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 60}  # no 7 and 8
    assert curves[EPOCH_LOSS] == {1: 1.5}


def test_an_event_file_that_ends_amid_a_record_is_read_up_to_it(tmp_path):
    log = EventLog(tmp_path, START)
    for step in (1, 2):
        log.write({"train/loss": float(step)}, step)
    log.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for missing in (1, 5, 20):
        path.write_bytes(whole[:-missing])
        assert curves_of(tmp_path)["train/loss"] == {1: 1.0}
    path.write_bytes(whole + b"\0" * 11)
    assert curves_of(tmp_path)["train/loss"] == {1: 1.0, 2: 2.0}


def test_an_x_axis_in_examples_is_read_back_as_steps(tmp_path):
    log = EventLog(tmp_path, START._replace(examples_per_step=4))
    log.write({"train/loss": 7.0}, 3)
    log.write_epoch(7.0, 1)
    log.close()
    (path,) = tmp_path.iterdir()
    written = {v.tag: e.step for e in iterate_events(path) for v in e.summary.value}
    assert (written["train/loss"], written[EPOCH_LOSS]) == (12, 1)
    assert curves_of(tmp_path) == {"train/loss": {3: 7.0}, EPOCH_LOSS: {1: 7.0}}


def open_again(config_file: Path, run_dir: Path, first_step: int, *overrides: str) -> Progress:
    return open_progress(
        load_config(config_file, overrides),
        run_dir,
        Start(first_step),
        steps_per_epoch=3,
        model=TI2V_5B,
        schedule=optax.linear_schedule(1.0, 0.0, 4),
        total_steps=6,
    )


def test_an_epoch_loss_counts_the_steps_before_the_resume(tmp_path):
    config_file, run_dir = tmp_path / "lora.toml", tmp_path / "run"
    config_file.write_text(CONFIG)
    run_dir.mkdir()
    with open_again(config_file, run_dir, 0, "x_axis_examples=true") as progress:
        for step in (1, 2, 3, 4, 5):
            progress.push(report(step, [[float(step)]]), new_program=step == 1)
        progress.flush()
    with open_again(config_file, run_dir, 4, "lr=3e-4", "x_axis_examples=true") as progress:
        for step in (5, 6):
            progress.push(report(step, [[10.0 * step]]), new_program=step == 5)
        progress.flush()
    curves = curves_of(run_dir)
    assert curves["train/loss"] == {1: 1, 2: 2, 3: 3, 4: 4, 5: 50, 6: 60}
    assert curves[EPOCH_LOSS] == {1: 2.0, 2: pytest.approx((4 + 50 + 60) / 3)}
    assert curves["train/lr"] == {1: 1.0, 2: 0.75, 3: 0.5, 4: 0.25, 5: 0.0, 6: 0.0}
    sessions, _ = read_events(run_dir)
    assert [session.first_step for session in sessions] == [0, 4]
    assert [session.first_epoch for session in sessions] == [1, 2]
    assert sessions[1].changes == ("lr None -> 0.0003", "optimizer.lr None -> 0.0003")
    assert tomllib.loads(sessions[1].config)["lr"] == 3e-4


def test_changes_are_listed_key_by_key():
    before, now = "a = 1\n[b]\nc = 2\nd = [1]\n", "a = 1\n[b]\nc = 3\ne = 'x'\n"
    assert list_changes(before, now) == ("b.c 2 -> 3", "b.d [1] -> None", "b.e None -> x")


def test_the_status_says_how_it_ended(tmp_path):
    with Progress(tmp_path, START, PLAN) as progress:
        assert read_status(tmp_path).state == "running"  # pyright: ignore
        progress.push(report(1, [[0.5]]), new_program=True)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.total_steps, status.loss) == ("stopped", 1, 6, 0.5)
    with Progress(tmp_path, START, PLAN._replace(total_steps=1)) as progress:
        progress.push(report(1, [[0.5]]), new_program=True)
    assert read_status(tmp_path).state == "done"  # pyright: ignore
    with (
        pytest.raises(BadInput, match="step 1 is nan"),
        Progress(tmp_path, START, PLAN) as progress,
    ):
        progress.push(report(1, [[np.nan]]), new_program=True)
    state = read_status(tmp_path).state  # pyright: ignore
    assert state.startswith("failed: the loss of step 1 is nan (clips: 0.mp4)")
    assert not list(tmp_path.glob(".status*"))


def test_a_status_tells_the_living_from_the_dead(tmp_path):
    assert read_status(tmp_path) is None
    write_status(tmp_path, Status("running", 1, 2, 1, 1))
    status = read_status(tmp_path)
    assert status is not None
    assert is_alive(status) is True
    assert is_alive(status._replace(process_started="1")) is False  # another one of its number
    assert is_alive(status._replace(host="another")) is None
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert is_alive(status._replace(process=child.pid)) is False
    (tmp_path / FILE).write_text(json.dumps({"version": 99}))
    with pytest.raises(BadInput, match="version 1 was expected"):
        read_status(tmp_path)


def test_a_full_disk_costs_the_status_alone(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "write_status", fail)
    monkeypatch.setattr(metrics, "STATUS_S", 0)
    monkeypatch.setattr(logging.getLogger("wan22_jax"), "propagate", True)
    with Progress(tmp_path, START, PLAN) as progress:
        progress.push(report(1, [[0.5]]), new_program=True)
    assert "the status of the run was not written" in caplog.text
    assert curves_of(tmp_path)["train/loss"] == {1: 0.5}


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3]), (2, [2, 3]), (None, [3])])
def test_a_log_gets_plain_lines(every, steps, tmp_path, monkeypatch, caplog):
    logger = logging.getLogger("wan22_jax")  # as no command of an earlier test has left it
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    caplog.set_level(logging.INFO, "wan22_jax")
    plan = PLAN._replace(total_steps=3, steps_per_print=every)
    with Progress(tmp_path, START, plan) as progress:
        for step in (1, 2, 3):
            progress.push(report(step, [[1.0]]), new_program=step == 1)
        progress.flush()
        progress.say("saving")
    # In whatever order tests run, a handler may stand at two loggers: each record counts once.
    lines = [record.getMessage() for record in dict.fromkeys(caplog.records)]
    assert [line.split(",")[0] for line in lines] == [*(f"step {k}/3" for k in steps), "saving"]


def test_a_terminal_gets_one_line(tmp_path, monkeypatch, capsys):
    for stream in (sys.stderr, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    with Progress(tmp_path, START, PLAN) as progress:
        for step in (1, 2, 3):
            progress.push(report(step, [[1.0]]), new_program=step == 1)
        progress.flush()
        progress._bar.refresh()
        progress.say("saving")
    said = capsys.readouterr()
    assert "step 3/6, epoch 1/2" in said.err
    assert "avr_loss 1.0000" in said.err
    assert said.out == "saving\n"


def test_the_line_says_all_there_is_to_know():
    status = Status("running", 1200, 5000, 3, 10, 0.2, 0.1234, 2e-5, 0.084, 11.9, 1.0, 1.0, 13.8)
    assert describe_status(status) == (
        "step 1200/5000, epoch 3/10, 0.084 s/step, 11.9 samples/s, avr_loss 0.1234, lr 2.00e-05, "
        "13.8 GB, ETA 0:05:19"
    )


def test_wandb_gets_the_same_scalars(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda values: calls.append(("log", values)),
        define_metric=lambda *names, **options: calls.append(("define", names, options)),
        finish=lambda **options: calls.append(("finish", options)),
    )
    fake = SimpleNamespace(
        login=lambda **options: calls.append(("login", options)),
        init=lambda **options: calls.append(("init", options)) or run,
        Error=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config_file, run_dir = tmp_path / "lora.toml", tmp_path / "run"
    wanted = "[monitoring]\nenable_wandb = true\nwandb_api_key = 'secret'\n"
    config_file.write_text(CONFIG + wanted)
    run_dir.mkdir()
    with pytest.raises(BadInput, match="needs wandb_tracker_name"):
        open_again(config_file, run_dir, 0)
    config_file.write_text(CONFIG + wanted + "wandb_tracker_name = 'pets'\n")
    with open_again(config_file, run_dir, 0) as progress:
        progress.push(report(1, [[0.5]], per_epoch=1), new_program=True)
        progress.add_scalars({"pets/loss": 0.25}, 1)
    names = [call[0] for call in calls]
    assert names == ["login", "init", "define", "define", "log", "log", "log", "finish"]
    assert calls[0][1] == {"key": "secret"}
    options = calls[1][1]
    assert (options["project"], options["name"], options["resume"]) == ("pets", "run", "allow")
    assert "secret" not in json.dumps(options["config"])
    assert "secret" not in dump_config(load_config(config_file))
    values = calls[4][1]
    written = {name: curve[1] for name, curve in curves_of(run_dir).items() if name in values}
    assert values == pytest.approx(written | {"step": 1})
    assert calls[5][1] == {EPOCH_LOSS: 0.5, "epoch": 1, "step": 1}
    assert calls[6][1] == {"pets/loss": 0.25, "step": 1}
    with open_again(config_file, run_dir, 1):
        pass
    assert [call[1] for call in calls if call[0] == "init"][1]["id"] == options["id"]

    def refuse(**_):
        raise RuntimeError("no such key")

    monkeypatch.setattr(fake, "init", refuse)
    with pytest.raises(BadInput, match=r"refused the run \(no such key\)"):
        open_again(config_file, run_dir, 1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match=r"pip install 'wan22-jax\[wandb\]'"):
        open_again(config_file, run_dir, 1)
