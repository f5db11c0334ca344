"""Several processes that fill one cache: nothing twice, nothing lost, one index at the end."""

import collections
import signal
import subprocess
import sys

import numpy as np
import pytest
from test_cache import BUCKET, ENCODERS, add_clip, check_readable, entry_of, fill

from wan22_jax.data.cache import open_cache
from wan22_jax.data.cache_writer import Process, list_shards, open_writer
from wan22_jax.errors import BadInput

_CLIPS = 60
_PROCESS = """
import sys, time; sys.path.insert(0, "tests")
from pathlib import Path
from test_cache import BUCKET, ENCODERS, arrays_of, entry_of
from test_cache_processes import _CLIPS
from wan22_jax.data.cache_writer import Process, open_writer
folder, number, num_processes, pause = Path(sys.argv[1]), *map(float, sys.argv[2:])
process = Process(int(number), int(num_processes))
entries = [entry_of(number) for number in range(_CLIPS)]
with open_writer(folder, encoders=ENCODERS, shard_bytes=8000, process=process) as writer:
    for number, entry in enumerate(entries):
        for key, array in zip(entry.keys, arrays_of(number), strict=True):
            if writer.owns(key) and key not in writer:
                writer.add(key, array)
                print(key, flush=True)
                time.sleep(pause)
    print("missing", writer.finish(entries, buckets=[BUCKET]), flush=True)
"""


def start(folder, number, num_processes, *, pause=0.0):
    arguments = [str(folder), str(number), str(num_processes), str(pause)]
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, *arguments], stdout=subprocess.PIPE, text=True
    )


def list_records(folder):
    return [key for _, keys in list_shards(folder) for key in keys.tolist()]


def test_processes_fill_one_cache_and_one_is_killed(tmp_path):
    children = [start(tmp_path, number, 3, pause=0.02) for number in range(3)]
    lines = [children[0].stdout.readline().split() for _ in range(9)]
    children[0].send_signal(signal.SIGKILL)
    outputs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [-signal.SIGKILL, 0, 0]
    lines += [line.split() for text in outputs for line in text.splitlines()]
    assert all(int(line[1]) > 0 for line in lines if line[0] == "missing")
    with pytest.raises(BadInput, match="no complete cache"):
        open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET])
    added = [line[0] for line in lines if line[0] != "missing"]

    again = start(tmp_path, 0, 3)
    more = [line.split() for line in again.communicate()[0].splitlines()]
    assert more[-1] == ["missing", "0"]
    added += [line[0] for line in more[:-1]]
    counts = collections.Counter(added)  # of records that were stored, over both runs
    expected = {key for number in range(_CLIPS) for key in entry_of(number).keys}
    assert len(expected - set(counts)) <= 1  # killed between storing a record and saying so
    assert set(counts.values()) == {1}
    records = list_records(tmp_path)
    assert len(records) == len(set(records)) == 2 * _CLIPS
    prefixes = collections.Counter(path.name[:4] for path in tmp_path.glob("*.keys"))
    assert set(prefixes) == {"0000", "0001", "0002"}
    assert min(prefixes.values()) > 1
    check_readable(tmp_path, range(_CLIPS))


def test_a_run_of_fewer_processes_takes_over_what_a_killed_one_left(tmp_path):
    children = [start(tmp_path, number, 4, pause=0.02) for number in range(4)]
    for child in children:
        for _ in range(3):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.communicate()
    waiting = {path.stem for path in tmp_path.glob("pending/*/*.safetensors")}
    assert len(waiting) > 4
    with open_writer(tmp_path, encoders=ENCODERS, process=Process(1, 2)) as writer:
        own = {path.stem for path in tmp_path.glob("pending/0001/*")}
        assert not (tmp_path / "pending" / "0003").exists()
        assert (tmp_path / "pending" / "0002").exists()  # of process 0
        assert all(key in writer for key in own)
        assert own < waiting
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        assert all(key in writer for key in waiting)
        assert not [path for path in tmp_path.glob("pending/*") if path.name != "0000"]


def test_what_a_living_process_has_in_hand_is_left_alone(tmp_path):
    with open_writer(tmp_path, encoders=ENCODERS, process=Process(1, 2)) as writer:
        add_clip(writer, 0)
        with (
            pytest.raises(BadInput, match="another wan22-cache is writing"),
            open_writer(tmp_path, encoders=ENCODERS),
        ):
            pass
    assert list(tmp_path.glob("pending/0001/*"))


def test_the_same_part_twice_is_refused(tmp_path):
    with open_writer(tmp_path, encoders=ENCODERS, process=Process(1, 3)):
        with (
            pytest.raises(BadInput, match="another wan22-cache is writing here"),
            open_writer(tmp_path, encoders=ENCODERS, process=Process(1, 3)),
        ):
            pass
        with open_writer(tmp_path, encoders=ENCODERS, process=Process(2, 3)):
            pass


def test_regenerating_needs_the_cache_for_itself(tmp_path):
    fill(tmp_path, [0])
    with (
        pytest.raises(BadInput, match="delete this folder instead"),
        open_writer(tmp_path, encoders=ENCODERS, regenerate=True, process=Process(0, 2)),
    ):
        pass
    with (
        open_writer(tmp_path, encoders=ENCODERS, process=Process(1, 2)),
        pytest.raises(BadInput, match="another wan22-cache is writing here"),
        open_writer(tmp_path, encoders=ENCODERS, regenerate=True),
    ):
        pass
    check_readable(tmp_path, [0])


def test_parts_are_of_equal_size(tmp_path):
    keys = [key for number in range(2000) for key in entry_of(number).keys]
    owners = []
    for number in range(4):
        with open_writer(tmp_path, encoders=ENCODERS, process=Process(number, 4)) as writer:
            owners.append([writer.owns(key) for key in keys])
    assert (np.sum(owners, axis=0) == 1).all()
    assert (np.abs(np.mean(owners, axis=1) - 0.25) < 0.03).all()
