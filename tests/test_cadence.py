"""What is due after which step, and which checkpoints may go?"""

from pathlib import Path

import pytest

from wan22_jax.config import TrainConfig, load_config
from wan22_jax.errors import BadInput
from wan22_jax.training.cadence import Cadence, Due, is_preview_ahead
from wan22_jax.training.retention import Retention, choose_superfluous, make_retention

STEPS_PER_EPOCH = 3


def make_config(tmp_path: Path, *keys: str) -> TrainConfig:
    path = tmp_path / "lora.toml"
    path.write_text(
        "output_dir = 'runs'\ndataset = 'd.toml'\nepochs = 4\ngradient_accumulation_steps = 2\n"
        "[model]\nckpt_path = 'm'\n[adapter]\n"
    )
    return load_config(path, keys)


def make_cadence(tmp_path: Path, *keys: str, clock=lambda: 0.0) -> Cadence:
    return Cadence(make_config(tmp_path, *keys), examples_per_step=2, clock=clock)


def list_due(cadence: Cadence, *, num_steps: int = 9, runs: int = 12) -> dict[int, Due]:
    """What is due after which step, where anything is."""
    due = {}
    for step in range(1, num_steps + 1):
        epoch, ends_epoch = (step - 1) // STEPS_PER_EPOCH + 1, step % STEPS_PER_EPOCH == 0
        due[step] = cadence.after(step, epoch, ends_epoch=ends_epoch, ends_run=step == runs)
    return {step: some for step, some in due.items() if some != Due(False, False, ())}


@pytest.mark.parametrize(
    ("key", "field", "expected"),
    [
        ("save_every_n_steps=4", "exports", {4: ("step4",), 8: ("step8",)}),
        ("save_every_n_epochs=2", "exports", {6: ("epoch2",)}),
        ("save_every_n_examples=9", "exports", {4: ("step4",), 8: ("step8",)}),  # 9 // 2 steps
        ("checkpoint_every_n_steps=4", "checkpoint", {4: True, 8: True}),
        ("checkpoint_every_n_epochs=2", "checkpoint", {6: True}),
        ("sample={prompts=['a'], every_n_steps=4}", "preview", {4: True, 8: True}),
        ("sample={prompts=['a'], every_n_epochs=2}", "preview", {6: True}),
    ],
)
def test_each_key_has_its_moments(key, field, expected, tmp_path):
    due = list_due(make_cadence(tmp_path, key))
    assert {step: getattr(some, field) for step, some in due.items()} == expected
    assert all(sum(map(bool, some)) == 1 for some in due.values())  # and nothing else is due


def test_steps_and_epochs_together_make_both_folders(tmp_path):
    due = list_due(make_cadence(tmp_path, "save_every_n_steps=3", "save_every_n_epochs=2"))
    assert due[3].exports == ("step3",)
    assert due[6].exports == ("epoch2", "step6")


@pytest.mark.parametrize("key", ["every_n_steps=4", "every_n_epochs=2"])
def test_whether_a_preview_is_ahead_is_known_before(key, tmp_path):
    key = f"sample={{prompts=['a'], {key}}}"
    previews = {step for step, due in list_due(make_cadence(tmp_path, key)).items() if due.preview}
    sample = make_config(tmp_path, key).sample
    for first in range(10):
        for last in range(10):
            ahead = is_preview_ahead(sample, first, last, offset=0, steps_per_epoch=STEPS_PER_EPOCH)
            assert ahead == any(first < step <= last for step in previews)


def test_minutes_count_from_the_last_checkpoint(tmp_path):
    now = 0.0
    keys = ("checkpoint_every_n_minutes=2", "checkpoint_every_n_steps=5")
    cadence = make_cadence(tmp_path, *keys, clock=lambda: now)
    due = []
    for step, now in enumerate([60, 121, 180, 240, 250, 365, 371], start=1):  # noqa: B007
        due.append(cadence.after(step, 1, ends_epoch=False, ends_run=False).checkpoint)
    assert due == [False, True, False, False, True, False, True]


def test_what_processes_have_agreed_on_counts_instead_of_the_clock(tmp_path):
    now = 0.0
    cadence = make_cadence(tmp_path, "checkpoint_every_n_minutes=2", clock=lambda: now)
    due = []
    for now, agreed in ((60, True), (150, False), (190, False)):  # noqa: B007
        before = cadence.is_late()
        done = cadence.after(1, 1, ends_epoch=False, ends_run=False, late=agreed)
        due.append((before, done.checkpoint))
    assert due == [(False, True), (False, False), (True, False)]


@pytest.mark.parametrize(
    ("runs", "key", "expected"),
    [
        (8, "epochs=4", ("step8",)),
        (9, "epochs=4", ("epoch3",)),
        (9, "save_every_n_epochs=3", ("epoch3",)),
        (9, "save_every_n_steps=9", ("step9",)),  # just done: not again under another name
    ],
)
def test_the_end_of_a_run_keeps_everything(runs, key, expected, tmp_path):
    due = list_due(make_cadence(tmp_path, key), num_steps=runs, runs=runs)
    assert due == {runs: Due(False, True, expected)}


def test_fewer_examples_than_a_step_has_are_refused(tmp_path):
    assert list_due(make_cadence(tmp_path, "save_every_n_examples=2"))[1].exports == ("step1",)
    with pytest.raises(BadInput, match="save_every_n_examples = 1: one step takes 2 examples"):
        make_cadence(tmp_path, "save_every_n_examples=1")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("save_dtype=float8", "use 'bfloat16'"),
        ("save_dtype=int4", "key save_dtype"),
        ("keep_last_n_checkpoints=0", "key keep_last_n_checkpoints"),
    ],
)
def test_what_cannot_be_is_refused(key, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        make_config(tmp_path, key)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["keep_every_n_steps=100"], "set keep_last_n_checkpoints"),
        (["keep_best_checkpoint=true"], "set keep_last_n_checkpoints"),
        (["keep_best_checkpoint=true", "keep_last_n_checkpoints=1"], "set eval_datasets and"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(keys, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        make_retention(make_config(tmp_path, *keys))


@pytest.mark.parametrize(
    ("retention", "gone"),
    [
        (Retention(last=None, every=None, best=False), []),
        (Retention(last=2, every=None, best=False), [2, 4, 6]),
        (Retention(last=2, every=4, best=False), [2, 6]),
        (Retention(last=1, every=None, best=True), [2, 6, 8]),
        (Retention(last=9, every=None, best=False), []),
    ],
)
def test_retention(retention, gone):
    losses = {2: None, 4: 0.1, 6: 0.3, 8: 0.2, 10: None}
    assert choose_superfluous(losses, retention) == gone
