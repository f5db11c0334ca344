"""The benchmark of the encoders runs, each part of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["vae", "--dtype", "float32"], {"bucket": "32x32x5", "dtype": "float32"}),
        (["text", "--stream", "--prompts", "2"], {"prompts": 2, "streamed": True}),
        (["folder", "--clips=3", "--devices=2"], {"clips": 3, "devices": 2, "dtype": "bfloat16"}),
    ],
)
def test_each_part_runs(words, expected):
    result = run("encode.py", *words)
    assert expected.items() <= result.items()
    assert min(value for key, value in result.items() if "s_per" in key or key == "s") > 0


@pytest.mark.parametrize("part", ["vae", "text"])
def test_the_peer_runs(part):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    assert run("peer_encode.py", part)["s"] > 0


def run(program, *words):
    command = [sys.executable, str(BENCHMARKS / program), *words]
    command += ["--tiny", "--bucket", "32x32x5"]
    command += [] if words[0] == "folder" else ["--repeats", "1"]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT ")[2])
