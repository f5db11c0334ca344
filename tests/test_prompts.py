"""Prompts with switches, one by one and in a file."""

from pathlib import Path

import pytest

from wan22_jax.errors import BadInput
from wan22_jax.prompts import Request, read_prompt, read_prompt_file


def read(text: str) -> Request:
    return read_prompt(text, Request(steps=20, negative="blurry"), source="here")


def test_every_switch_is_read():
    found = read("a dog -- runs --w 832 --h 480 --f 81 --d 42 --s 30 --g 4.5 --fs 3 --n two  words")
    assert found == Request(
        "a dog -- runs", "two  words", None, 832, 480, 81, 30, 4.5, 3.0, 42, "unipc"
    )


def test_what_no_switch_says_is_the_default():
    assert read("  一只狗--跑, 2 < 3  ") == Request("一只狗--跑, 2 < 3", "blurry", steps=20)
    assert read("a dog --n").negative == ""  # the model's own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a dog --x 3", "here: --x is no switch of a prompt; there are --n --i --w --h"),
        ("a dog --w wide", "here: --w: a whole number expected, got 'wide'"),
        ("a dog --w 8.5", "here: --w: a whole number expected, got '8.5'"),
        ("a dog --g", "here: --g: a number expected, got ''"),
        ("a dog --g nan", "here: guidance: a number expected, got nan; 5 is usual"),
        ("a dog --s 0", "here: steps: 1 or more expected, got 0; 50 is usual"),
        ("a dog --fs -1", "here: shift: a number over 0 expected, got -1; 5 is usual"),
        ("a dog --d -2", "here: seed: 0 or more expected, or -1 to draw one, got -2"),
        ("a dog --w 32 --w 64", "here: --w is given twice; give it once"),
        (" --w 32", "here: a text was expected, it is empty; say what the video shows"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(BadInput) as caught:
        read(text)
    assert str(caught.value).startswith(message)


def test_a_file_has_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# remark\n\na dog --i dog.png --d 3\n  a cat\n", "utf-8")
    dog, cat = read_prompt_file(file, Request())
    assert (dog.prompt, dog.image, dog.seed) == ("a dog", tmp_path / "dog.png", 3)
    assert cat == Request("a cat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n", "holds no prompt; write one a line"),
        (b"a cat\na dog --w x\n", "line 2: --w: a whole number expected"),
        (b"\xff\xfe\x00", "a text file with a prompt a line was expected"),
        (None, "a text file with a prompt a line was expected"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_prompt_file(file, Request())
    assert str(file) in str(caught.value)


def test_a_picture_that_is_named_in_full_stays_so():
    found = read_prompt("a dog --i /x/dog.png", Request(), source="here", folder=Path("there"))
    assert found.image == Path("/x/dog.png")
