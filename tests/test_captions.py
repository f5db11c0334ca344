"""Captions: where they come from, what becomes of them, what is refused."""

import json
import os
import unicodedata
from collections import Counter

import pytest

from wan22_jax.data.captions import CaptionRule, Captions, apply_rule
from wan22_jax.errors import BadInput

TAGS = "cat, dog, bird, fish, cow"


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf a cat\r\n")
    (tmp_path / "b.txt").write_text("")
    captions = Captions(tmp_path, ["."])
    assert [captions.read(f"{stem}.mp4") for stem in "abc"] == [("a cat",), ("",), ()]
    assert captions.name_source("c.mp4") == tmp_path / "c.txt"


@pytest.mark.parametrize("name", ["a.txt", "captions.json", "metadata.jsonl"])
def test_a_pipe_does_not_keep_the_reader_waiting(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadInput, match=f"{name}: is not a file"):
        Captions(tmp_path, ["."]).read("a.mp4")


def test_captions_json_wins_over_text_files_even_where_it_has_no_caption(tmp_path):
    (tmp_path / "a.txt").write_text("beside")
    (tmp_path / "b.txt").write_text("beside")
    write(tmp_path, captions_json={"a.mp4": [" one ", "two"], "gone.mp4": ["x"]})
    captions = Captions(tmp_path, ["."])
    assert captions.read("a.mp4") == ("one", "two")
    assert captions.read("b.mp4") == ()
    assert captions.name_source("b.mp4") == tmp_path / "captions.json"
    assert list(captions.list_unused(["a.mp4", "b.mp4"])) == [
        f"{tmp_path / 'captions.json'}: left out gone.mp4, no clip has this name"
    ]


def test_metadata_rows(tmp_path):
    write_rows(
        tmp_path / "metadata.jsonl",
        {"video_path": "sub/a.mp4", "caption": "one", "fps": 24},
        {"image_path": "./b.png", "text": ["two", "three"]},
        {"file_name": "sub/a.mp4", "text": "four"},
    )
    (tmp_path / "sub").mkdir()
    captions = Captions(tmp_path, [".", "sub"])
    assert captions.read("sub/a.mp4") == ("one", "four")
    assert captions.read("b.png") == ("two", "three")
    assert captions.read("c.png") == ()
    assert not list(captions.list_unused(["sub/a.mp4", "b.png"]))


def test_the_nearest_list_above_a_clip_speaks_for_it(tmp_path):
    write(
        tmp_path,
        captions_json={"a.mp4": ["top"], "deep/a.mp4": ["from the top"], "own/a.mp4": ["unused"]},
        own__captions_json={"a.mp4": ["own"]},
        deep__a="beside",
    )
    captions = Captions(tmp_path, [".", "own", "deep"])
    assert captions.read("own/a.mp4") == ("own",)
    assert captions.read("deep/a.mp4") == ("from the top",)
    unused = list(captions.list_unused(["a.mp4", "deep/a.mp4", "own/a.mp4"]))
    assert len(unused) == 1
    assert "left out own/a.mp4" in unused[0]


def test_a_name_matches_however_its_accents_are_written(tmp_path):
    name = "größe é.mp4"
    composed, split = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    assert composed != split
    for listed, asked in ((composed, split), (split, composed)):
        write(tmp_path, captions_json={listed: ["x"]})
        assert Captions(tmp_path, ["."]).read(asked) == ("x",)


def test_shuffled_variants_depend_on_text_and_number_alone():
    rule = CaptionRule("PRE ", num_shuffled=6)
    variants = apply_rule([TAGS], rule)
    assert variants == apply_rule([TAGS], rule)
    assert variants[:2] == apply_rule([TAGS], rule._replace(num_shuffled=2))
    assert apply_rule(["other", TAGS], rule)[6:] == variants
    assert all(variant.startswith("PRE ") for variant in variants)
    assert all(sorted(v[4:].split(", ")) == sorted(TAGS.split(", ")) for v in variants)
    assert len(set(variants)) > 3
    # Pinned: other texts would be encoded again, and would train otherwise after an update.
    assert variants[0] == "PRE bird, cow, fish, dog, cat"


def test_every_place_is_as_likely_for_every_tag():
    first = Counter()
    for number in range(300):
        caption = f"{TAGS}, {number}"
        first[
            caption.split(", ").index(apply_rule([caption], CaptionRule("", 1))[0].split(", ")[0])
        ] += 1
    assert set(first) == set(range(6))
    assert max(first.values()) < 90  # 50 expected


def test_prefix_and_delimiter():
    assert apply_rule(["a", ""], CaptionRule("x: ")) == ("x: a", "x: ")
    rule = CaptionRule("", 5, "; ")
    assert set(apply_rule(["a, b"], rule)) == {"a, b"}  # one tag
    assert set(apply_rule(["a, b; c"], rule)) == {"a, b; c", "c; a, b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "expected an object"),
        ('{"a.mp4": "text"}', "a.mp4: expected a list of captions, got 'text'"),
        ('{"a.mp4": [1]}', "a.mp4: expected a list of captions"),
        ('{"a.mp4": ["\\ud800"]}', "a.mp4: expected a list of captions"),
        ('{"a.mp4": ["x"], "a.mp4": ["y"]}', "a.mp4 is there twice"),
        ('{"a.mp4": ["x"], "./a.mp4": ["y"]}', "a file is there under two spellings"),
    ],
)
def test_a_wrong_captions_file_is_named(tmp_path, content, message):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(BadInput, match=f"captions.json: {message}"):
        Captions(tmp_path, ["."])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: is not valid JSON"),
        ("3", "line 2: expected an object"),
        ('{"caption": "x"}', "line 2: expected one of video_path, .* found none"),
        ('{"video_path": "a", "file_name": "a", "text": ""}', "line 2: expected one of video_path"),
        ('{"video_path": "a.mp4", "caption": 3}', "line 2: expected text as file name and caption"),
        ('{"video_path": 3, "caption": "x"}', "line 2: expected text as file name and caption"),
    ],
)
def test_a_wrong_metadata_row_is_named(tmp_path, row, message):
    (tmp_path / "metadata.jsonl").write_text("\n" + row)
    with pytest.raises(BadInput, match=f"metadata.jsonl: {message}"):
        Captions(tmp_path, ["."])


def test_two_lists_in_one_folder_are_refused(tmp_path):
    write(tmp_path, captions_json={})
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(BadInput, match=r"metadata\.jsonl lies beside it"):
        Captions(tmp_path, ["."])
