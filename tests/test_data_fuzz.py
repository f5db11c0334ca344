"""Damaged input of every kind: a message or a result, never a crash, never a hang."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_clips import write_image, write_video

from wan22_jax.data.captions import Captions
from wan22_jax.dataset import read_directories
from wan22_jax.dataset_config import DatasetConfig, DirectoryConfig
from wan22_jax.errors import BadInput

QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
GOOD_DATASET = b"""
resolutions = [512, [1280, 720]]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
frame_buckets = [1, 33]
caption_prefix = 'x'
cache_shuffle_num = 2
[[directory]]
path = 'clips'
num_repeats = 2
size_buckets = [[512, 512, 33]]
[[directory]]
path = 'more'
ar_buckets = [[16, 9], [9, 16]]
video_clip_mode = 'uniform'
clips_per_video = 3
"""
GOOD_CAPTIONS = '{"a.mp4": ["one", "two \\u00e9"], "b.mp4": []}'
GOOD_ROWS = '{"video_path": "a.mp4", "caption": "x"}\n{"file_name": "b", "text": ["y", "z"]}\n'

numbers = (
    st.integers() | st.floats() | st.sampled_from([0, -1, 32, 512, 1.5, 10**9, 10**400, 1e308])
)
scalars = numbers | st.booleans() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
plausible = {
    "resolutions": st.lists(numbers | st.lists(numbers, max_size=3), max_size=3),
    "ar_buckets": st.lists(numbers | st.lists(numbers, max_size=3), max_size=3),
    "frame_buckets": st.lists(st.integers() | st.sampled_from([1, 5, 33]), max_size=3),
    "size_buckets": st.lists(st.lists(numbers, min_size=2, max_size=4), max_size=2),
    "min_ar": numbers,
    "max_ar": numbers,
    "num_ar_buckets": numbers,
    "enable_ar_bucket": st.booleans(),
    "path": st.text(max_size=8),
    "fps": numbers,
    "video_clip_mode": st.sampled_from(["single_beginning", "single_middle", "uniform", "all"]),
}


def tables(model, *, without=()):
    keys = [name for name in model.model_fields if name not in without]
    key = st.sampled_from(keys) | st.text(max_size=5)
    pairs = key.flatmap(lambda k: st.tuples(st.just(k), plausible.get(k, values) | values))
    return st.lists(pairs, max_size=7).map(dict)


def attempt(path, read):
    """What ``read`` returns, or None if it refuses with a message that names the file."""
    try:
        return read()
    except BadInput as problem:
        message = str(problem)
    assert str(path) in message
    return None


def read(path):
    directories = attempt(path, lambda: read_directories(path))
    if directories is None:
        return None
    for directory in directories:
        assert 0 < len(directory.rule.buckets) < 10_000
    return directories


@QUICK
@given(tables(DatasetConfig, without=["directory"]), st.lists(tables(DirectoryConfig), max_size=2))
def test_any_dataset_table_is_read_or_refused(tmp_path, top, directories):
    path = tmp_path / "dataset.toml"
    tree = top | {"directory": [{"path": f"clips{n}"} | own for n, own in enumerate(directories)]}
    try:
        path.write_text(tomli_w.dumps(tree), "utf-8")
    except (ValueError, TypeError):  # this cannot be written as TOML
        return
    read(path)


def mutate(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, size = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 4, 16])
        kind = rng.randrange(5)
        if kind == 0:
            content[at : at + size] = rng.randbytes(size)
        elif kind == 1:
            del content[at : at + size]
        elif kind == 2:
            content[at:at] = content[max(at - size, 0) : at] * rng.choice([1, 2, 50])
        elif kind == 3 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        else:
            pieces = [b"[", b"{", b"\0", b"-1", b"9" * 5000, b"inf", b"nan", b'"', b"\n", b"]" * 2]
            content[at:at] = rng.choice(pieces)
    return bytes(content)


def test_any_damage_to_a_dataset_file_is_read_or_refused(tmp_path):
    rng, path, read_whole = random.Random(0), tmp_path / "dataset.toml", 0
    path.write_bytes(GOOD_DATASET)
    assert len(read(path)) == 2
    for _ in range(1500):
        path.write_bytes(mutate(GOOD_DATASET, rng))
        read_whole += read(path) is not None
    assert 20 < read_whole < 1400  # both happen


@pytest.mark.parametrize(("nested", "depth"), [(b"[", 5000), (b"{a=", 5000)])
def test_deep_nesting_is_refused(tmp_path, nested, depth):
    path = tmp_path / "dataset.toml"
    path.write_bytes(b"a = " + nested * depth)
    with pytest.raises(BadInput, match="is not valid TOML"):
        read_directories(path)


@pytest.mark.parametrize(
    ("name", "good"), [("captions.json", GOOD_CAPTIONS), ("metadata.jsonl", GOOD_ROWS)]
)
def test_any_damage_to_a_caption_file_is_read_or_refused(tmp_path, name, good):
    rng, path, read_whole = random.Random(1), tmp_path / name, 0
    for _ in range(1500):
        path.write_bytes(mutate(good.encode(), rng))
        captions = attempt(path, lambda: Captions(tmp_path, ["."]))
        if captions is None:
            continue
        read_whole += 1
        for text in captions.read("a.mp4"):
            text.encode()
        list(captions.list_unused(["a.mp4"]))
    assert 20 < read_whole < 1400


# The child probes and reads mutated files; what kills it, or makes it hang, fails the test.
CHILD = """
import json, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_data_fuzz import mutate
from wan22_jax.data.video import probe, read_clip
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket

folder, name, seed, rounds = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
good, rng = (folder / name).read_bytes(), random.Random(seed)
path = folder / f"bad{Path(name).suffix}"
counts = {"refused": 0, "read": 0}
for number in range(rounds):
    path.write_bytes(mutate(good, rng))
    try:
        info = probe(path)
        assert info.width_px > 0 and info.height_px > 0 and info.frames_24 >= 0, info
        if info.frames_24 < 10**6 and info.frames_24 > 0:
            frames = 5 if info.frames_24 >= 5 else 1
            clip = read_clip(path, info, Bucket(32, 32, frames), start=0)
            assert clip.shape == (frames, 32, 32, 3)
            if info.frames_24 > 8:
                read_clip(path, info, Bucket(32, 32, 5), start=info.frames_24 - 5)
        counts["read"] += 1
    except BadInput as problem:
        assert str(path) in str(problem) and "\\n" not in str(problem).strip(), problem
        counts["refused"] += 1
    except BaseException:
        path.rename(folder / f"culprit{number}{path.suffix}")
        raise
print(json.dumps(counts))
"""

FILES = {
    "a.mp4": {"codec": "libx264", "frames": 16},
    "b.mkv": {"codec": "libx264", "frames": 16, "gop": 6},
    "c.webm": {"codec": "libvpx-vp9", "frames": 8},
    "d.avi": {"codec": "mpeg4", "frames": 8},
    "e.ts": {"codec": "mpeg2video", "frames": 8},
    "f.mov": {"codec": "qtrle", "frames": 4, "pix_fmt": "argb"},
}


@pytest.mark.parametrize(("name", "rounds"), [*((name, 80) for name in FILES), ("g.png", 300)])
def test_no_damaged_media_file_kills_or_hangs_the_probe(tmp_path, name, rounds):
    if name in FILES:
        write_video(tmp_path / name, **FILES[name])
    else:
        write_image(tmp_path / name, (24, 20))
    arguments = [str(Path(__file__).parent), str(tmp_path), name, "0", str(rounds)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["refused"] > rounds / 20
    assert sum(counts.values()) == rounds
