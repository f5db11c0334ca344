"""Where a command writes: what cannot be is refused before the work, what is left over goes."""

import errno
import os
from pathlib import Path

import pytest

import convert.download
import convert.export
import convert.lora_tools
import convert.weights
from wan22_jax import demo, outputs
from wan22_jax.errors import BadInput
from wan22_jax.outputs import check_folder, check_output, replace_folder, replacing
from wan22_jax.run_folder import make_run_dir


def make_places(folder: Path) -> dict[str, Path]:
    """Paths that cannot be written, by what is said of them."""
    (folder / "file").touch()
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "": Path("/proc/x/out"),  # which of several reasons, the kernel says
        "Symlink loop|Too many levels": folder / "loop" / "out",
        "Not a directory": folder / "file" / "out",
        "File name too long": folder / ("x" * 250),
    }


def refuses(capsys, complaint: str, command, *words: object) -> None:
    capsys.readouterr()
    assert command([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line


# Every command says so, before it looks at anything else that a path of it could be.
COMMANDS = {
    "convert": (convert.weights.main, ["--ckpt_path", "none", "--out"], ""),
    "download": (convert.download.main, ["--out"], ""),
    "export": (convert.export.main, ["--checkpoint", "no", "--out"], ".safetensors"),
    "lora convert": (convert.lora_tools.main, ["convert", "--lora", "no", "--out"], ".safetensors"),
    "lora resize": (
        convert.lora_tools.main,
        ["resize", "--lora", "no", "--rank", "2", "--out"],
        ".safetensors",
    ),
    "lora extract": (
        convert.lora_tools.main,
        ["extract", "--base", "no", "--tuned", "no", "--out"],
        ".safetensors",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_refuses_a_place_where_nothing_can_be_written(name, tmp_path, capsys):
    command, words, suffix = COMMANDS[name]
    for place in make_places(tmp_path).values():
        if name == "download" and len(place.name) > 200:  # a folder to write into has no twin
            continue
        out = place.with_name(place.name + suffix)
        refuses(capsys, f"{out}: cannot be written (", command, *words, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("check", [check_output, check_folder, make_run_dir])
def test_why_nothing_can_be_written_is_said(check, tmp_path):
    for why, place in make_places(tmp_path).items():
        if check is check_output or len(place.name) < 200:
            with pytest.raises(BadInput, match=rf"out|x+: cannot be written \(({why})"):
                check(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_the_demo_refuses_it_too(capsys):
    assert demo.main(["--out", "/proc/x"]) == 2
    assert "/proc/x: cannot be written (" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EROFS, errno.EPERM])
def test_a_disk_that_takes_nothing_is_named(number, tmp_path, monkeypatch):
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refuse)
    with pytest.raises(BadInput, match=rf"out: cannot be written \({os.strerror(number)}\)"):
        check_output(tmp_path / "new" / "out")


def test_a_full_disk_is_not_a_wrong_place(tmp_path, monkeypatch):
    def fill(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", fill)
    with pytest.raises(OSError, match="No space left"):
        check_output(tmp_path / "out")


def test_a_mount_point_is_refused_where_it_would_be_replaced(tmp_path, capsys):
    for name in ("convert", "lora convert"):
        command, words, suffix = COMMANDS[name]
        place = Path("/proc")
        if suffix:
            place = tmp_path / f"link{suffix}"
            place.symlink_to("/proc")
        refuses(
            capsys, f"{place}: is a mount point, so it cannot be replaced", command, *words, place
        )
    check_folder(Path("/dev/shm"))


def test_a_place_that_is_right_is_left_as_it_is(tmp_path):
    check_output(tmp_path / "new" / "deep" / "out")
    check_folder(tmp_path / "new" / "deep")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    check_output(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_fails_leaves_nothing_and_keeps_what_was_there(tmp_path):
    (tmp_path / "out").write_text("before")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "out") as partial:
        partial.write_text(f"after {1 / 0}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("left", ["file", "folder", "link"])
@pytest.mark.parametrize("made", ["file", "folder"])
def test_what_a_killed_process_left_is_replaced(left, made, tmp_path):
    with replacing(tmp_path / "x") as partial:  # to learn its name
        partial.touch()
    leftover = tmp_path / partial.name
    (tmp_path / "x").unlink()
    if left == "file":
        leftover.touch()
    elif left == "folder":
        (leftover / "deep").mkdir(parents=True)
    else:
        leftover.symlink_to(tmp_path)
    with replacing(tmp_path / "x") as partial:
        assert partial == leftover
        if made == "file":
            partial.write_text("new")
        else:
            partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").is_dir() == (made == "folder")


def test_a_folder_that_a_killed_process_had_put_aside_goes(tmp_path):
    """Between two changes of names: the earlier folder is aside, nothing has the name."""
    (tmp_path / ".out.old" / "deep").mkdir(parents=True)
    (tmp_path / "partial").mkdir()
    replace_folder(tmp_path / "partial", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".out.old").mkdir()
    (tmp_path / "out").rmdir()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "lost", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
