"""What ``wan22-cache`` refuses or warns of, in one line each."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import cache_place
import pytest
from make_clips import write_video

from wan22_jax import encode

models, place, counted = cache_place.models, cache_place.place, cache_place.counted  # fixtures


def _no_caption(place):
    (place.clips / "a.txt").unlink()


def _latin_1(place):
    (place.clips / "a.txt").write_bytes("größer".encode("latin-1"))


def _junk(place):
    (place.clips / "a.mp4").write_bytes(b"junk")


def _short(place):
    write_video(place.clips / "a.mp4", 4)


def _empty_folder(place):
    shutil.rmtree(place.clips)
    place.clips.mkdir()


def _no_folder(place):
    shutil.rmtree(place.clips)


def _captions_json(place):
    (place.clips / "captions.json").write_text('{"a.mp4": ["a"], "b.mp4": ["b"]}')


def test_allow_drop_leaves_out_what_is_too_short(place, capsys):
    place.fill()
    _short(place)
    assert place.run() == 2
    assert "too short" in capsys.readouterr().err
    assert place.run("--allow-drop") == 0
    assert "warning: left out: " in capsys.readouterr().err
    assert set(place.stored()) == {"b.mp4", "c.png"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_caption, "a.txt: caption missing; write it"),
        (_latin_1, "a.txt: is not UTF-8 (byte 2); save it again"),
        (_junk, "a.mp4: does not decode as a video"),
        (_short, "a.mp4: too short: 4 frames at 24 fps, the shortest video bucket needs 5"),
        (_empty_folder, "holds no videos or images; put clips"),
        (_no_folder, "no such folder; correct path"),
        (_captions_json, "clips/captions.json: caption missing; write it, remove c.png"),
    ],
)
def test_bad_data_is_one_line_and_nothing_is_encoded(place, counted, capsys, spoil, message):
    place.fill()
    spoil(place)
    assert place.run() == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert str(place.clips) in last_line
    assert message in last_line
    assert (counted.captions, counted.clips) == (0, 0)
    left = [path.name for path in (place.clips / "cache").rglob("*") if path.is_file()]
    assert left in ([], ["probed.jsonl"])


def test_many_problems_are_counted_in_one_line(place, capsys):
    for number in range(8):
        (place.clips / f"{number}.mp4").write_bytes(b"junk")
    assert place.run() == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "8 of 8 files cannot be used" in last_line
    assert "4.mp4" in last_line
    assert "5.mp4" not in last_line
    assert "and 3 more" in last_line


def test_what_is_left_out_is_said(place, capsys):
    place.fill()
    (place.clips / "anim.gif").write_bytes(b"")
    (place.clips / "z.txt").write_text("no clip")
    (place.clips / "more").mkdir()
    (place.clips / ".hidden.mp4").write_bytes(b"")
    (place.clips / "meta.json").write_text("{}")
    assert place.run() == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert [Path(line.split(": ")[1]).name for line in warnings] == ["anim.gif", "z.txt", "more"]


def test_a_caption_that_is_too_long_is_said(place, capsys):
    place.fill()
    (place.clips / "a.txt").write_text("grey " * 600)
    assert place.run() == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is cut at 512" in line]
    assert ": grey grey" in line


def test_full_disk_is_said_before_encoding(place, counted, capsys, monkeypatch):
    place.fill()
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert place.run() == 2
    assert "GB free; free some space" in capsys.readouterr().err
    assert (counted.captions, counted.clips) == (0, 0)


def test_a_folder_listed_twice_is_refused(place, capsys):
    place.fill()
    place.dataset.write_text(
        place.dataset.read_text() + f"[[directory]]\npath = '{place.clips}/../clips'\n"
    )
    assert place.run() == 2
    assert "is listed twice" in capsys.readouterr().err


@pytest.mark.parametrize(("index", "count"), [("2", "2"), ("-1", "2"), ("0", "0"), ("0", "10001")])
def test_a_process_outside_its_run_is_refused(place, capsys, index, count):
    assert place.run(f"--process_index={index}", "--process_count", count) == 2
    assert "expected 0 <= index < count <= 10000" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--verify", "--show-batch=1", "--gc", "--regenerate_cache"])
def test_a_flag_that_does_nothing_else_stands_alone(place, capsys, other):
    assert place.run("--dry-run", other) == 2
    assert "--dry-run does nothing else" in capsys.readouterr().err
