"""XLA's flags, and compiled programs on disk: the second process finds what the first one left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wan22_jax import encode, sample
from wan22_jax.errors import BadInput
from wan22_jax.sharding import claim_gpu

SCRIPT = """
import logging
import sys

import jax

from wan22_jax.sharding import keep_compiled

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
keep_compiled()
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((4, 4)))
print("hit" if "/jax/compilation_cache/cache_hits" in events else "miss")
"""


def compile_once(**variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    root = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    always = {"PYTHONPATH": root, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=kept | always | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "{}"}, "wan22_jax/xla"),
        ({"HOME": "{}", "XDG_CACHE_HOME": ""}, ".cache/wan22_jax/xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "{}/own", "XDG_CACHE_HOME": "{}/not_this"}, "own"),
    ],
    ids=["xdg", "home", "own"],
)
def test_the_second_process_does_not_compile_again(variables, expected, tmp_path):
    variables = {name: value.format(tmp_path) for name, value in variables.items()}
    assert compile_once(**variables).endswith("miss\n")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name.endswith("-cache") for path in files)
    assert all(path.is_relative_to(tmp_path / expected) for path in files)
    assert compile_once(**variables).endswith("hit\n")


def test_xla_knows_its_flags_and_the_users_win(monkeypatch):
    """XLA ends a process at once whose flags it does not know."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_dot_merger_threshold_mb=16")
    claim_gpu()
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_gpu_dot_merger_threshold_mb=16",
        "--xla_gpu_enable_triton_gemm=false",
        "--xla_disable_hlo_passes=cublas-pad-for-gemms",
        "--xla_gpu_experimental_parallel_async_compute_limit=64",
    ]
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert "deterministic" not in os.environ["XLA_FLAGS"]
    monkeypatch.delenv("XLA_FLAGS")
    claim_gpu(deterministic=True)
    flags = os.environ["XLA_FLAGS"].split()
    assert "--xla_gpu_dot_merger_threshold_mb=0" in flags
    assert "--xla_gpu_deterministic_ops=true" in flags
    compile_once()


def test_an_empty_variable_keeps_nothing(tmp_path):
    variables = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)}
    assert compile_once(**variables) == "miss\n"
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told_and_passed_over(tmp_path):
    (tmp_path / "file").touch()
    said = compile_once(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert "compiled programs are not kept" in said
    assert str(tmp_path / "file" / "wan22_jax") in said
    assert said.endswith("miss\n")


def test_the_commands_keep_what_they_compile(monkeypatch, tmp_path):
    calls = []
    for command in (encode, sample):
        monkeypatch.setattr(command, "keep_compiled", lambda name=command: calls.append(name))
    monkeypatch.setattr(sample, "sample", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["wan22-sample", "--model", "model", "--prompt", "a cat"])
    assert sample.main() == 0
    with pytest.raises(BadInput, match="no such config file"):
        encode.encode_dataset(tmp_path / "none.toml", tmp_path)
    assert calls == [sample, encode]
