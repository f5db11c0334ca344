import errno
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from wan22_jax.data.cache import (
    make_latents_key,
    make_mask_key,
    make_text_key,
    name_encoders,
    open_cache,
)
from wan22_jax.data.cache_writer import open_writer
from wan22_jax.data.index import NOWHERE, ClipEntry, KeySet, pack_keys, unpack_key
from wan22_jax.data.upkeep import collect_garbage
from wan22_jax.errors import BadInput, run_command
from wan22_jax.geometry import Bucket

BUCKET = Bucket(64, 32, 5)
DIGESTS = {"vae": "a" * 64, "text_encoder": "b" * 64, "transformer": "c" * 64}
ENCODERS = name_encoders(DIGESTS, vae_dtype="bfloat16")


def arrays_of(number):
    rng = np.random.default_rng(number)
    return rng.normal(size=(2, 2, 4, 48)).astype(np.float32), rng.normal(size=(number % 5 + 1, 8))


def latents_key_of(name):
    return make_latents_key(name, BUCKET)


def entry_of(number):
    return ClipEntry(
        f"{number}.mp4",
        BUCKET,
        make_latents_key(f"{number}", BUCKET),
        (make_text_key(f"{number}"),),
    )


def add_clip(writer, number):
    entry = entry_of(number)
    for key, array in zip(entry.keys, arrays_of(number), strict=True):
        writer.add(key, array)


def fill(folder, numbers, **options):
    with open_writer(folder, encoders=ENCODERS, **options) as writer:
        for number in numbers:
            add_clip(writer, number)
        writer.finish([entry_of(number) for number in numbers], buckets=[BUCKET])


def check_readable(folder, numbers):
    cache = open_cache(folder, encoders=ENCODERS, buckets=[BUCKET])
    assert [clip.file for clip in cache.clips] == [f"{number}.mp4" for number in numbers]
    for index, number in enumerate(numbers):
        assert cache.clips[index] == entry_of(number)
        stored = cache.read(index)
        assert stored.mask_YX is None
        for array, expected in zip(stored[:2], arrays_of(number), strict=True):
            assert array.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(array, expected.astype(ml_dtypes.bfloat16))


def test_caches_of_float32_latents_keep_their_name():
    early = f"vae {'a' * 16}, text_encoder {'b' * 16}"
    assert name_encoders(DIGESTS, vae_dtype="float32") == early
    assert name_encoders(DIGESTS, vae_dtype="bfloat16") != early


def test_what_is_written_is_read(tmp_path):
    fill(tmp_path, range(7), shard_bytes=4000)
    check_readable(tmp_path, range(7))
    assert len(list(tmp_path.glob("*.array_record"))) > 1  # so reading crossed shards
    assert not list(tmp_path.glob("pending/*/*"))


def test_shards_are_only_ever_added(tmp_path):
    fill(tmp_path, range(3))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("0*")}
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        assert all(entry_of(number).latents_key in writer for number in range(3))
        assert entry_of(3).latents_key not in writer
        add_clip(writer, 3)
        writer.finish([entry_of(0), entry_of(3)], buckets=[BUCKET])  # 1 and 2 left the folder
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    check_readable(tmp_path, [0, 3])


def test_captions_masks_and_starts_are_kept(tmp_path):
    clips = [
        ClipEntry(
            f"clip {number} ä.mp4",
            BUCKET,
            make_latents_key(f"{number}", BUCKET, cut="uniform"),
            tuple(make_text_key(f"{number}{letter}") for letter in "abc"[: number + 1]),
            start=7 * number,
            mask_key=make_mask_key(f"{number}", BUCKET) if number % 2 else None,
        )
        for number in range(3)
    ]
    with open_writer(tmp_path, encoders=ENCODERS, shard_bytes=3000) as writer:
        for number, clip in enumerate(clips):
            writer.add(clip.latents_key, np.full((2, 2, 4, 48), number))
            for letter, key in zip("abc", clip.text_keys, strict=False):
                writer.add(key, np.full((2, 8), ord(letter)), note=f"{number}{letter}")
            if clip.mask_key:
                writer.add(clip.mask_key, np.full((2, 4), 0.5))
        writer.add(make_text_key(""), np.full((1, 8), 77))
        writer.finish(clips, buckets=[BUCKET])
    cache = open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET])
    assert list(cache.clips) == clips
    assert cache.uncond_row != NOWHERE
    for number, clip in enumerate(clips):
        for caption in range(len(clip.text_keys)):
            latents, text, mask = cache.read(number, caption=caption)
            assert (latents == number).all()
            assert (text == ord("abc"[caption])).all()
            assert (mask is None) == (clip.mask_key is None)
            assert mask is None or (mask.shape == (2, 4) and (mask == 0.5).all())
            assert cache.read_caption(number, caption=caption) == f"{number}{'abc'[caption]}"
        assert (cache.read(number, caption=None).text_SE == 77).all()
        assert cache.read_caption(number, caption=None) == ""


@pytest.mark.parametrize("damage", ["", "{", "[]", "3", '{"version": 2}', "[" * 100_000])
def test_a_damaged_header_is_named(tmp_path, damage):
    fill(tmp_path, [0])
    (tmp_path / "cache.json").write_text(damage)
    message = r"cache\.json: is damaged; .*--regenerate_cache"
    with pytest.raises(BadInput, match=message):
        open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET])
    with pytest.raises(BadInput, match=message), open_writer(tmp_path, encoders=ENCODERS):
        pass
    fill(tmp_path, [0], regenerate=True)
    check_readable(tmp_path, [0])


def test_an_earlier_version_is_refused_with_the_remedy(tmp_path):
    fill(tmp_path, [0])
    header = (tmp_path / "cache.json").read_text()
    (tmp_path / "cache.json").write_text(header.replace('"version": 2', '"version": 1'))
    for name in ("clips.json", "00000.json", "00000.array_record", "lock"):
        (tmp_path / name).touch()
    message = "cache version 1, this program writes 2; .*--regenerate_cache"
    with pytest.raises(BadInput, match=message):
        open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET])
    with pytest.raises(BadInput, match=message), open_writer(tmp_path, encoders=ENCODERS):
        pass
    fill(tmp_path, [0, 1], regenerate=True)
    check_readable(tmp_path, [0, 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000-00000.array_record",
        "0000-00000.keys",
        "cache.json",
        "clips.index",
        "lock-0000",
        "pending",
    ]


def test_an_index_is_mapped_and_not_read(tmp_path):
    fill(tmp_path, range(5))
    index = open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET]).clips
    assert {"file", "keys_R", "latents_row_N", "text_row_C"} < set(index.arrays)
    for array in index.arrays.values():
        assert isinstance(array, np.memmap)
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert index.find(entry_of(3).latents_key) == index.latents_row(3)


def test_a_record_that_was_not_added_is_a_fault(tmp_path):
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        add_clip(writer, 0)
        with pytest.raises(ValueError, match=entry_of(1).latents_key):
            writer.finish([entry_of(0), entry_of(1)], buckets=[BUCKET])
    assert not (tmp_path / "clips.index").exists()


def test_no_shard_takes_the_name_of_one_that_was_deleted(tmp_path):
    """Or else the old index would take its records for others."""
    fill(tmp_path, [0, 1])
    for path in tmp_path.glob("0000-00000.*"):
        path.unlink()
    with open_writer(tmp_path, encoders=ENCODERS, shard_bytes=1) as writer:
        add_clip(writer, 1)  # and then the run is killed
    assert not list(tmp_path.glob("0000-00000.*"))
    with pytest.raises(BadInput, match=r"0000-00000\.array_record: is gone"):
        open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET])
    fill(tmp_path, [0, 1])
    check_readable(tmp_path, [0, 1])


def test_a_damaged_index_is_named(tmp_path):
    fill(tmp_path, [0])
    good = (tmp_path / "clips.index").read_bytes()
    arrays = range(good.index(b"}}"), len(good))
    flipped = [good[:at] + bytes([good[at] ^ 2]) + good[at + 1 :] for at in arrays]
    for damage in (b"", b"junk", good[:400], *flipped):
        (tmp_path / "clips.index").write_bytes(damage)
        with pytest.raises(BadInput, match=r"clips\.index: is damaged .*run wan22-cache"):
            open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET])
    fill(tmp_path, [0, 1])
    check_readable(tmp_path, [0, 1])


@pytest.mark.parametrize("damage", [b"", b"\0" * 17, b"t" * 33, b"k" * 17])
def test_damaged_keys_are_named(tmp_path, damage):
    fill(tmp_path, [0])
    (tmp_path / "0000-00000.keys").write_bytes(damage)
    with (
        pytest.raises(BadInput, match=r"0000-00000\.keys: is damaged; delete 0000-00000\.\*"),
        open_writer(tmp_path, encoders=ENCODERS),
    ):
        pass
    for path in tmp_path.glob("0000-00000.*"):
        path.unlink()
    fill(tmp_path, [0])
    check_readable(tmp_path, [0])


def test_keys_tell_contents_apart():
    other = BUCKET._replace(frames=9)
    assert make_latents_key("a", BUCKET) != make_latents_key("b", BUCKET)
    assert make_latents_key("a", BUCKET) != make_latents_key("a", other)
    assert make_latents_key("a", BUCKET) != make_latents_key("a", BUCKET, cut="single_middle")
    assert make_text_key("a") != make_text_key("b")
    assert make_mask_key("a", BUCKET) == make_mask_key("a", other)  # a mask has no frames
    assert make_mask_key("a", BUCKET) != make_mask_key("a", BUCKET._replace(width_px=32))


def test_packed_keys_are_found():
    keys = [kind(f"{n}") for n in range(3000) for kind in (make_text_key, latents_key_of)]
    packed = pack_keys(keys)
    assert any(len(key) < 17 for key in packed.tolist())  # NumPy hides zeros at the end
    assert [unpack_key(key) for key in packed.tolist()] == keys
    found = KeySet(packed[:4000]).find(packed)
    np.testing.assert_array_equal(found[:4000], np.arange(4000))
    assert (found[4000:] == NOWHERE).all()
    assert (KeySet(packed[:0]).find(packed) == NOWHERE).all()


def test_unfinished_cache_is_refused_and_continued(tmp_path):
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        add_clip(writer, 0)
    with pytest.raises(BadInput, match="no complete cache; run wan22-cache"):
        open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET])
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        assert entry_of(0).latents_key in writer
        add_clip(writer, 1)
        writer.finish([entry_of(0), entry_of(1)], buckets=[BUCKET])
    check_readable(tmp_path, [0, 1])


_KILLED = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from test_cache import ENCODERS, add_clip, open_writer
with open_writer(Path(sys.argv[1]), encoders=ENCODERS, shard_bytes=4000) as writer:
    for number in range(10**6):
        add_clip(writer, number)
        print(number, flush=True)
"""


def test_kill_9_loses_the_clip_in_hand_only(tmp_path):
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        done = [int(child.stdout.readline()) for _ in range(12)]
        child.send_signal(signal.SIGKILL)
        done += [int(line) for line in child.communicate()[0].split()]
        with open_writer(tmp_path, encoders=ENCODERS) as writer:
            assert all(key in writer for number in done for key in entry_of(number).keys)
            writer.finish([entry_of(number) for number in done], buckets=[BUCKET])
        check_readable(tmp_path, done)
        assert not list(tmp_path.rglob("*.partial"))


def test_killed_between_shard_and_tidying_up(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, open_writer(tmp_path, encoders=ENCODERS) as writer:
        add_clip(writer, 0)
        patch.setattr("pathlib.Path.unlink", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.finish([entry_of(0)], buckets=[BUCKET])
    assert list(tmp_path.glob("pending/*/*"))
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        assert not list(tmp_path.glob("pending/*/*"))
        writer.finish([entry_of(0)], buckets=[BUCKET])
    check_readable(tmp_path, [0])
    assert len(list(tmp_path.glob("*.array_record"))) == 1


def test_other_encoders_are_named_with_the_remedy(tmp_path):
    fill(tmp_path, [0])
    other = name_encoders(DIGESTS | {"vae": "d" * 64}, vae_dtype="bfloat16")
    message = f"other encoders .*{'a' * 16}.*{'d' * 16}.*--regenerate_cache"
    with pytest.raises(BadInput, match=message):
        open_cache(tmp_path, encoders=other, buckets=[BUCKET])
    with (
        pytest.raises(BadInput, match=message),
        open_writer(tmp_path, encoders=other),
    ):
        pass
    with open_writer(tmp_path, encoders=other, regenerate=True) as writer:
        assert entry_of(0).latents_key not in writer
    with pytest.raises(BadInput, match="no complete cache"):
        open_cache(tmp_path, encoders=other, buckets=[BUCKET])


def test_regenerating_keeps_foreign_files(tmp_path):
    (tmp_path / "metadata").mkdir()  # diffusion-pipe's cache has the same folder
    (tmp_path / "metadata" / "data.arrow").write_text("theirs")
    fill(tmp_path, [0, 1])
    fill(tmp_path, [0], regenerate=True)
    assert (tmp_path / "metadata" / "data.arrow").exists()
    check_readable(tmp_path, [0])


def test_other_buckets_are_refused(tmp_path):
    fill(tmp_path, [0])
    with pytest.raises(BadInput, match=r"cached for 64x32x5, .* asks for 64x32x9; run wan22-cache"):
        open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET._replace(frames=9)])


def test_other_options_are_refused(tmp_path):
    asked = {"video_clip_mode": "'single_middle'", "fps": "'12'"}
    with open_writer(tmp_path, encoders=ENCODERS) as writer:
        add_clip(writer, 0)
        writer.finish([entry_of(0)], buckets=[BUCKET], options=asked)
    open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET], options=asked)
    now = asked | {"fps": "'30'", "recursive": "'True'"}
    said = r"fps was '12', is '30'; recursive was not set, is 'True'\); run wan22-cache"
    with pytest.raises(BadInput, match=said):
        open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET], options=now)


def test_two_writers_at_once_are_refused(tmp_path):
    with (
        open_writer(tmp_path, encoders=ENCODERS),
        pytest.raises(BadInput, match="another wan22-cache"),
        open_writer(tmp_path, encoders=ENCODERS),
    ):
        pass
    fill(tmp_path, [0])  # the lock is gone


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BadInput, match="cannot be written"),
        open_writer(tmp_path / "file" / "cache", encoders=ENCODERS),
    ):
        pass


def test_damage_is_named_when_read(tmp_path):
    fill(tmp_path, [0])
    (shard,) = tmp_path.glob("*.array_record")
    data = bytearray(shard.read_bytes())
    data[2000:2600] = bytes(600)
    shard.write_bytes(data)
    cache = open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET])
    with pytest.raises(BadInput, match=r"0\.mp4 is damaged .*delete 0000-00000\.\* .*again"):
        cache.read(0)
    shard.unlink()
    with pytest.raises(BadInput, match=r"array_record: is gone.*delete 0000-00000\.\*"):
        open_cache(tmp_path, encoders=ENCODERS, buckets=[BUCKET])


@contextmanager
def small_disk(folder, *, size):
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        check=False,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


@pytest.mark.parametrize("shard_bytes", [4000, 2**30], ids=["in a shard", "in a record"])
def test_full_disk_keeps_what_is_done(tmp_path, capsys, shard_bytes):
    with small_disk(tmp_path / "small", size="300k") as mount:
        code = run_command(lambda: fill(mount, range(1000), shard_bytes=shard_bytes))
        error = capsys.readouterr().err
        assert code == 2
        assert re.fullmatch(r"error: the disk is full while writing \S+; free .*again\n", error)
        assert not list(mount.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=8m", mount], check=True)
        with open_writer(mount, encoders=ENCODERS) as writer:
            done = [n for n in range(100) if all(key in writer for key in entry_of(n).keys)]
            assert len(done) >= 5
            writer.finish([entry_of(number) for number in done], buckets=[BUCKET])
        check_readable(mount, done)


@pytest.mark.parametrize("what", ["index", "collecting"])
def test_full_disk_leaves_the_old_index_whole(tmp_path, capsys, what):
    with small_disk(tmp_path / "small", size="8m") as mount:
        fill(mount, range(4), shard_bytes=4000)
        fill(mount, [0, 1], shard_bytes=4000)
        with open_writer(mount, encoders=ENCODERS) as writer:
            free = os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize
            (mount / "theirs").write_bytes(bytes(free - 4096))
            entries = [entry_of(number) for number in (0, 1, 2, 3) * 50]
            code = run_command(
                partial(writer.finish, entries, buckets=[BUCKET])
                if what == "index"
                else partial(collect_garbage, mount)
            )
        error = capsys.readouterr().err
        assert code == 2
        assert re.fullmatch(r"error: the disk is full while writing \S+; free .*again\n", error)
        check_readable(mount, [0, 1])
        (mount / "theirs").unlink()
        fill(mount, [0, 1, 2], shard_bytes=4000)
        assert not list(mount.rglob("*.partial"))
        check_readable(mount, [0, 1, 2])


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    fill(tmp_path, [0, 1])
    check_readable(tmp_path, [0, 1])
