"""Checking a cache and dropping what nothing needs."""

import functools

import numpy as np
import pytest
from test_cache import BUCKET, ENCODERS, add_clip, check_readable, entry_of, fill

from wan22_jax.data import upkeep
from wan22_jax.data.cache import make_mask_key, make_text_key, open_cache
from wan22_jax.data.cache_writer import Process, list_shards, open_writer
from wan22_jax.data.upkeep import collect_garbage, describe_found, verify_cache
from wan22_jax.errors import BadInput

open_it = functools.partial(open_cache, encoders=ENCODERS, buckets=[BUCKET])


def shrink(folder, numbers):
    """Makes the index name these clips only."""
    with open_writer(folder, encoders=ENCODERS) as writer:
        writer.finish([entry_of(number) for number in numbers], buckets=[BUCKET])


def collect(folder, **options):
    with open_writer(folder, encoders=ENCODERS):
        return collect_garbage(folder, **options)


def count_records(folder):
    return sum(shard.num_records for shard, _ in list_shards(folder))


@pytest.mark.parametrize("shard_bytes", [4000, 2**30])
def test_records_that_nothing_needs_go(tmp_path, shard_bytes):
    fill(tmp_path, range(20), shard_bytes=shard_bytes)
    assert collect(tmp_path) == 0
    kept = [0, 1, 2, 7, 13]
    shrink(tmp_path, kept)
    assert collect(tmp_path, shard_bytes=9000) == 30
    assert count_records(tmp_path) == 10
    check_readable(tmp_path, kept)
    assert collect(tmp_path) == 0
    fill(tmp_path, [7, 20])  # the records of 7 are there twice now
    check_readable(tmp_path, [7, 20])
    assert collect(tmp_path) == 10
    check_readable(tmp_path, [7, 20])


def test_whole_shards_are_left_as_they_are(tmp_path):
    fill(tmp_path, range(3))
    fill(tmp_path, range(6))
    (first, second) = sorted(tmp_path.glob("*.array_record"))
    data = first.read_bytes()
    shrink(tmp_path, range(4))
    collect(tmp_path)
    assert first.read_bytes() == data
    assert not second.exists()
    check_readable(tmp_path, range(4))


def test_the_empty_caption_is_kept(tmp_path):
    fill(tmp_path, range(2))
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        writer.add(make_text_key(""), np.ones((1, 8)))
        writer.finish([entry_of(0)], buckets=[BUCKET])
    assert collect(tmp_path) == 2
    cache = open_it(tmp_path)
    assert (cache.read(0, caption=None).text_SE == 1).all()


def test_records_of_an_unfinished_run_are_kept(tmp_path):
    fill(tmp_path, range(3))
    with open_writer(tmp_path, encoders=ENCODERS, shard_bytes=1) as writer:
        add_clip(writer, 5)
    shrink_later = [0, 5]
    assert collect(tmp_path) == 0
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        assert all(key in writer for key in entry_of(5).keys)
    shrink(tmp_path, shrink_later)
    assert collect(tmp_path) == 4
    check_readable(tmp_path, shrink_later)


@pytest.mark.parametrize("stop_at", ["write_shard", "replace_file", "after"])
def test_killed_while_collecting(tmp_path, monkeypatch, stop_at):
    fill(tmp_path, range(12), shard_bytes=4000)
    shrink(tmp_path, [3, 8])
    with monkeypatch.context() as patch:
        if stop_at == "after":
            patch.setattr("pathlib.Path.unlink", stop)
        elif stop_at == "write_shard":
            patch.setattr(upkeep, stop_at, count_down(upkeep.write_shard))
        else:
            patch.setattr(upkeep, stop_at, stop)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path, shard_bytes=1)
    check_readable(tmp_path, [3, 8])
    shrink(tmp_path, [3, 8])  # as wan22-cache --gc does first
    collect(tmp_path)
    assert count_records(tmp_path) == 4
    check_readable(tmp_path, [3, 8])


def stop(*_, **__):
    raise KeyboardInterrupt


def count_down(function):
    calls = []

    def second_time_stop(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        function(*args, **options)

    return second_time_stop


def test_collecting_waits_for_other_processes(tmp_path):
    fill(tmp_path, range(3))
    shrink(tmp_path, [0])
    with (
        open_writer(tmp_path, encoders=ENCODERS, process=Process(1, 2)),
        pytest.raises(BadInput, match="another wan22-cache is writing here"),
    ):
        collect(tmp_path)
    check_readable(tmp_path, [0])


def test_a_whole_cache_is_counted(tmp_path):
    fill(tmp_path, range(7), shard_bytes=4000)
    shrink(tmp_path, range(6))
    cache = open_it(tmp_path)
    found = verify_cache(cache)
    assert found.num_records == {"latents": 7, "text": 7}
    assert (found.num_unused, found.problems) == (2, ())
    line = describe_found(cache, found)
    assert "6 clips, 7 latents, 7 text, 0.0 MB, all whole, 2 unused (--gc drops them)" in line


def spoil_shape(writer):
    writer.add(entry_of(0).latents_key, np.zeros((1, 2, 4, 48)))
    writer.add(entry_of(0).text_keys[0], np.zeros((513, 8)))


def spoil_values(writer):
    writer.add(entry_of(0).latents_key, np.full((2, 2, 4, 48), np.nan))
    writer.add(entry_of(0).text_keys[0], np.full((1, 8), np.inf))


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (
            spoil_shape,
            [
                "latents of 0.mp4: has shape (1, 2, 4, 48), expected (2, 2, 4, 48)",
                "text of 0.mp4: has shape (513, 8), expected up to 512 rows",
            ],
        ),
        (spoil_values, ["latents of 0.mp4: is not finite", "text of 0.mp4: is not finite"]),
    ],
)
def test_wrong_records_are_named(tmp_path, spoil, messages):
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        spoil(writer)
        add_clip(writer, 1)
        writer.finish([entry_of(0), entry_of(1)], buckets=[BUCKET])
    cache = open_it(tmp_path)
    found = verify_cache(cache)
    assert sorted(found.problems) == messages
    with pytest.raises(BadInput, match=r"2 of 4 records are damaged: .*0\.mp4.*0000-00000\.\*"):
        describe_found(cache, found)


def test_a_mask_outside_its_range_is_named(tmp_path):
    masks = {0: np.full((2, 4), 1.5), 1: np.ones((2, 2)), 2: np.full((2, 4), 0.5)}
    clips = [
        entry_of(number)._replace(mask_key=make_mask_key(f"{number}", BUCKET)) for number in masks
    ]
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        for number, clip in enumerate(clips):
            add_clip(writer, number)
            writer.add(clip.mask_key, masks[number])
        writer.finish(clips, buckets=[BUCKET])
    assert verify_cache(open_it(tmp_path)).problems == (
        "mask of 0.mp4: is not within 0 and 1",
        "mask of 1.mp4: has shape (2, 2), expected (2, 4)",
    )


def test_bytes_that_changed_on_disk_are_found(tmp_path):
    fill(tmp_path, range(6), shard_bytes=4000)
    shard = sorted(tmp_path.glob("*.array_record"))[1]
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    found = verify_cache(open_it(tmp_path))
    (damage,) = found.problems
    assert "cannot be read" in damage
    assert found.shards == (shard.name,)
    shard.write_bytes(data[:100])
    (problem, *_) = verify_cache(open_it(tmp_path)).problems
    assert "cannot be read" in problem


def test_what_was_in_a_damaged_shard_is_all_that_is_encoded_again(tmp_path):
    """The advice that goes with damage, followed."""
    fill(tmp_path, range(6), shard_bytes=4000)
    shard = sorted(tmp_path.glob("*.array_record"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    cache = open_it(tmp_path)
    found = verify_cache(cache)
    with pytest.raises(BadInput, match=rf"delete {shard.stem}\.\* there and run wan22-cache again"):
        describe_found(cache, found)
    for path in tmp_path.glob(f"{shard.stem}.*"):
        path.unlink()
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        missing = [n for n in range(6) if not all(key in writer for key in entry_of(n).keys)]
        assert 0 < len(missing) < 6
        assert len(found.problems) == sum(
            key not in writer for number in missing for key in entry_of(number).keys
        )
        for number in missing:
            add_clip(writer, number)
        writer.finish([entry_of(number) for number in range(6)], buckets=[BUCKET])
    assert not verify_cache(open_it(tmp_path)).problems
    check_readable(tmp_path, range(6))
