"""What a user sees of a mistake: one line, exit code 2."""

import errno
import os

import pytest

from wan22_jax.errors import BadInput, is_full_disk, one_line, run_command


def fail_with(error: Exception) -> int:
    def command() -> None:
        raise error

    return run_command(command)


def test_a_message_of_several_lines_is_printed_as_one(capsys):
    assert fail_with(BadInput("a.toml: this\n  and that")) == 2
    assert capsys.readouterr().err == "error: a.toml: this and that\n"


def test_no_file_name_breaks_a_line_or_colours_the_terminal(capsys):
    name = os.fsdecode("ä 日本\n\x1b[31m\u2028".encode() + b"\xff")
    assert one_line(name) == r"ä 日本\n\x1b[31m\u2028?"
    assert fail_with(BadInput(name)) == 2
    assert capsys.readouterr().err == "error: ä 日本 \\x1b[31m ?\n"


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG]
)
def test_a_path_that_cannot_be_is_named(number, capsys):
    assert fail_with(OSError(number, os.strerror(number), "runs/x")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: runs/x: {os.strerror(number)}; ")
    assert error.count("\n") == 1


def test_a_full_disk_is_one_line(capsys):
    assert fail_with(OSError(errno.ENOSPC, "No space left on device", "a.mp4")) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full while writing a.mp4; ")


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone", "x"), ValueError("y")])
def test_what_is_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        fail_with(error)


def test_ctrl_c_has_its_own_code(capsys):
    def command() -> None:
        raise KeyboardInterrupt

    assert run_command(command) == 130
    assert "interrupted" in capsys.readouterr().err


def test_full_disks_are_known_by_number_and_by_text():
    assert is_full_disk(OSError(errno.EDQUOT, "quota"))
    assert is_full_disk(ValueError("RESOURCE_EXHAUSTED: writing: No space left on device"))
    assert not is_full_disk(OSError(errno.EACCES, "No space left on device"))
    assert not is_full_disk(ValueError("RESOURCE_EXHAUSTED"))
