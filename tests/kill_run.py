"""Does a run that is killed again and again end as one that is not?

SIGKILL comes at random moments, half of them while something is being saved; each time the run
resumes. Its last checkpoint and its exported adapters must be those of the uninterrupted run::

    python tests/kill_run.py --kills 200

Children are forked from one process that has imported everything, so that they start in a second.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles sooner

import jax
import safetensors.numpy
from tiny_run import digest_state, hash_arrays, prepare

from wan22_jax import train
from wan22_jax.checkpoint import FOLDER, list_steps

SETTINGS = ("save_every_n_steps=2", "keep_last_n_checkpoints=2", "save_dtype='float32'")
_DEADLINE_S = 300  # of one child


def main() -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # All of what is compiled is kept: children are to start soon. JAX has read variables.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        run_child(Path(folder), "prepare", lambda: prepare(Path()))
        counts = kill_often(Path(folder), kills=args.kills, seed=args.seed)
    sys.stdout.write(f"every run ended alike; {counts}\n")
    return 0


def kill_often(folder: Path, *, kills: int, seed: int) -> dict[str, int]:
    """Kills runs until there were so many kills; returns how many there were, and where.

    Args:
        folder: made by ``prepare``.
        kills: at least so many.
        seed: of the moments.

    Raises:
        AssertionError: a run does not resume, or ends differently.
    """
    rng = random.Random(seed)
    expected, seconds = {}, 0.0
    for name in ("compiling", "whole"):
        code, seconds = run_child(folder, name, lambda name=name: train_once(name))
        assert code == 0, f"the uninterrupted run ended with {code}, see {folder}/{name}.log"
        expected[name] = describe_end(folder, name)
    assert expected["compiling"] == expected["whole"]
    counts = {"kills": 0, "while saving": 0, "before a checkpoint": 0, "runs": 0}
    while counts["kills"] < kills:
        name = f"run{counts['runs']}"
        counts["runs"] += 1
        while True:
            in_save = rng.randrange(1, 5) if rng.random() < 0.5 else 0
            moment = rng.random() * (0.1 if in_save else seconds)
            code, _ = run_child(
                folder, name, lambda name=name: train_once(name), kill_after=moment, in_save=in_save
            )
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"{name} ended with {code}, see {folder}/{name}.log"
            saving, steps = look_at(folder / name)
            counts["kills"] += 1
            counts["while saving"] += bool(saving)
            counts["before a checkpoint"] += not steps
            sys.stdout.write(f"{name}: killed after {moment:.2f} s, has {steps}, {saving}\n")
        end = describe_end(folder, name)
        assert end == expected["whole"], f"{name} ended differently: {end}, {expected['whole']}"
    return counts


def train_once(name: str) -> None:
    """Starts a run, or goes on with it if it has a checkpoint; does not return."""
    resume = ["--resume_from_checkpoint"] if look_at(Path(name))[1] else []
    os._exit(train.main(["--config", "lora.toml", *resume, f"output_dir={name}", *SETTINGS]))


def look_at(output_dir: Path, run: str = "*") -> tuple[list[str], list[int]]:
    """Lists what is half-written in runs' folders, and their complete checkpoints."""
    halves = [
        path.name
        for pattern in (f"{FOLDER}/*.*", ".*.partial", ".*.replaced")
        for path in output_dir.glob(f"{run}/{pattern}")
    ]
    steps = [step for path in output_dir.glob(f"{run}/{FOLDER}") for step in list_steps(path)]
    return sorted(halves), sorted(steps)


def describe_end(folder: Path, name: str) -> str:
    """Hashes what a run has made, in a child: a process that has used JAX cannot be forked."""

    def describe() -> None:
        run_dir = sorted(Path(name).iterdir())[-1]
        made = {
            str(path.relative_to(run_dir)): hash_arrays(safetensors.numpy.load_file(path))
            for path in sorted(run_dir.glob("[es]*/*.safetensors"))
        }
        made |= {"state": digest_state(run_dir), "left over": look_at(Path(name), run_dir.name)}
        Path(f"{name}.json").write_text(json.dumps(made, indent=1))

    run_child(folder, f"{name}.end", describe)
    return (folder / f"{name}.json").read_text()


def run_child(
    folder: Path, name: str, command, *, kill_after: float | None = None, in_save: int = 0
) -> tuple[int, float]:
    """Runs a function in a child; returns its exit code, negative for a signal, and seconds.

    Args:
        folder: where it works, and its output goes to a file.
        name: of that file, and of the folder that is watched.
        command: the function.
        kill_after: seconds until SIGKILL.
        in_save: count them from when something is half-written for the so manieth time.
    """
    start = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        file = os.open(f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        command()
        os._exit(0)
    was_saving = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic() - start
        if done:
            return os.waitstatus_to_exitcode(status), now
        assert now < _DEADLINE_S, f"{name}: still runs after {now:.0f} s"
        is_saving = in_save > 0 and bool(look_at(folder / name)[0])
        in_save -= is_saving and not was_saving
        if is_saving and in_save == 0 and kill_after is not None:
            kill_after += now
        was_saving = is_saving
        if kill_after is not None and not in_save and now >= kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.002)


if __name__ == "__main__":
    sys.exit(main())
