"""The safetensors reader: the bits that were written, or one line that says what is wrong."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from wan22_jax.errors import BadInput
from wan22_jax.tensor_files import DTYPES, SafetensorsFiles, TensorFiles

QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [24, 28]},
    "c": {"dtype": "F16", "shape": [], "data_offsets": [28, 30]},
}


def write(path, header, num_bytes=30):
    """Writes a file of any header, a text or what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(num_bytes)))
    return path


# What is right


def test_every_dtype_is_read_bit_for_bit(tmp_path):
    bits = np.arange(48, dtype=np.uint8)
    entries, content = {}, b""
    for name, dtype in DTYPES.items():
        array = (bits % 2 if name == "BOOL" else bits).view(dtype)
        offsets = [len(content), len(content) + 48]
        entries[name] = {"dtype": name, "shape": [2, array.size // 2], "data_offsets": offsets}
        content += array.tobytes()
    text = json.dumps(entries).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)
    files = SafetensorsFiles(file)
    assert isinstance(files, TensorFiles)
    for name, dtype in DTYPES.items():
        expected = (bits % 2 if name == "BOOL" else bits).view(dtype).reshape(2, -1)
        assert (files.dtypes[name], files.shapes[name]) == (name, expected.shape)
        for rows in (slice(None), slice(1, 2), slice(1), slice(2, 2), slice(-1, None)):
            found = files.read(name, rows)
            assert found.dtype == dtype
            assert found.shape == expected[rows].shape
            assert found.tobytes() == expected[rows].tobytes()


def test_the_library_s_own_files_are_read(tmp_path):
    tensors = {
        "scalar": np.full((), 2.5, np.float32),
        "nothing": np.zeros((0, 3), np.float16),
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "bytes": np.arange(7, dtype=np.uint8),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"who": "me"})
    files = SafetensorsFiles(tmp_path / "x.safetensors")
    assert files.metadata == {"who": "me"}
    assert files.shapes == {name: array.shape for name, array in tensors.items()}
    for name, array in tensors.items():
        found = files.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()


def test_rows_cost_the_memory_of_rows(tmp_path):
    save_file({"x": np.zeros((64, 2**16), np.float32)}, tmp_path / "x.safetensors")
    files = SafetensorsFiles(tmp_path / "x.safetensors")
    tracemalloc.start()
    files.read("x", slice(5, 6))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2**18 <= peak < 2**19


# What is wrong


def changed(name="a", **fields):
    return GOOD | {name: GOOD[name] | fields}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (changed(data_offsets=[0, 2**63]), "a has impossible data_offsets"),
        (changed(data_offsets=[0, 2**62]), "a has 4611686018427387904 bytes"),
        (changed(data_offsets=[-24, 0]), "a has impossible data_offsets"),
        (changed(data_offsets=[24, 0]), "a has -24 bytes"),
        (changed(data_offsets=[0, 24, 28]), "a has impossible data_offsets"),
        (changed(data_offsets=[0.0, 24.0]), "a has impossible data_offsets"),
        (changed("b", data_offsets=[20, 24]), "b starts at 20, where 24 was expected"),
        (changed("b", data_offsets=[25, 29]), "b starts at 25, where 24 was expected"),
        (changed("c", shape=[2], data_offsets=[28, 32]), "it has 30 bytes of tensors and should"),
        (changed(shape=[2**40, 2**40]), "a has the impossible shape"),
        (changed(shape=[2**63, 0]), "a has an impossible shape"),
        (changed(shape=[0, 2**62], data_offsets=[0, 0]), "a has the impossible shape"),
        (changed(shape=[1] * 17), "a has an impossible shape"),
        (changed(shape=[True, 6]), "a has an impossible shape"),
        (changed(shape="23"), "a has an impossible shape"),
        (changed(shape=[2, 4]), r"a has 24 bytes, F32 of \[2, 4\] has 32"),
        (changed(dtype="F64"), r"a has 24 bytes, F64 of \[2, 3\] has 48"),
        (changed(dtype="F4"), "a has the dtype 'F4', which is unknown here"),
        (changed(dtype=None), "a has the dtype None, which is unknown here"),
        (GOOD | {"a": {"dtype": "F32"}}, "a should have dtype, shape and data_offsets"),
        (GOOD | {"a": 5}, "a should have dtype, shape and data_offsets"),
        (GOOD | {"__metadata__": {"x": 1}}, "__metadata__ should hold texts"),
        ([1, 2], "its header is no JSON object"),
        (b'{"a": 1, "a": 2}', "a comes twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "dtype comes twice"),
        (b"[" * 10**5, "recursion"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "can't decode byte"),
        (b"", "Expecting value"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_a_wrong_header_is_one_line(header, why, tmp_path):
    file = write(tmp_path / "x.safetensors", header)
    match = rf"x\.safetensors: a complete safetensors file was expected \(.*{why}"
    with pytest.raises(BadInput, match=match):
        SafetensorsFiles(file)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 400])
def test_a_header_longer_than_its_file_costs_nothing(length, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}" * 100)
    tracemalloc.start()
    with pytest.raises(BadInput, match="it has 208 bytes and should have"):
        SafetensorsFiles(file)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_header_beyond_the_format_s_limit_is_not_read(tmp_path):
    file = tmp_path / "x.safetensors"
    with file.open("wb") as content:
        content.write((10**9).to_bytes(8, "little"))
        content.truncate(2 * 10**9)  # takes no room on disk
    with pytest.raises(BadInput, match="its header cannot have 1000000000 bytes"):
        SafetensorsFiles(file)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="a complete safetensors file was expected"):
            SafetensorsFiles(type(tmp_path)(path))


def test_a_file_that_shrinks_is_named(tmp_path):
    save_file({"x": np.zeros(100)}, tmp_path / "x.safetensors")
    files = SafetensorsFiles(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 300)
    with pytest.raises(BadInput, match=r"x\.safetensors: x has become shorter"):
        files.read("x")


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": [1]}',
        '{"weight_map": {"a": "' + "x" * 300 + '"}}',
        '{"weight_map": {"a": "\\u0000"}}',
        "[" * 10**5,
        "[]",
    ],
)
def test_a_wrong_index_is_named(index, tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=r"an index with a weight_map|of its index"):
        SafetensorsFiles(tmp_path)


# Anything at all


sizes = st.integers() | st.sampled_from([0, 1, 2, 4, 24, 2**31, 2**62, 2**63, 10**30])
scalars = sizes | st.floats() | st.booleans() | st.none() | st.text(max_size=4)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4"]) | values,
        "shape": st.lists(sizes, max_size=4) | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), fields | values)


@QUICK
@given(header=headers | values, extra=st.integers(0, 40))
def test_any_header_is_read_or_refused(header, extra, tmp_path_factory):
    read_all(write(tmp_path_factory.getbasetemp() / "any.safetensors", header, extra))


@QUICK
@given(data=st.data())
def test_any_damage_is_read_or_refused(data, tmp_path_factory):
    file = write(tmp_path_factory.getbasetemp() / "damaged.safetensors", GOOD)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_all(file)


def read_all(file):
    try:
        files = SafetensorsFiles(file)
    except BadInput as error:
        refusal = str(error)
    else:
        num_bytes = sum(files.read(name).nbytes for name in files.shapes)
        assert num_bytes <= file.stat().st_size
        return
    assert refusal.startswith(f"{file}: a complete safetensors file was expected (")
