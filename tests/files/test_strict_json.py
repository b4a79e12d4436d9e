"""JSON files that a program or a person may have changed: what is refused, and in which words."""

import json
import os
import re
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo2trl.errors import CheckpointError, StoreCorrupt, StoreError
from zo2trl.files.strict_json import Fields, parse_json, read_json, write_json

MAX_BYTES = 1 << 20
MAX_CPU_S = 10.0  # tells a reader that follows a bomb from a slow machine
MAX_EXTRA_BYTES = 100 * 2**20

HOSTILE: dict[str, tuple[bytes, str]] = {
    "NaN": (b'{"lr": NaN}', "NaN is no number"),
    "infinity": (b'{"lr": Infinity}', "Infinity is no number"),
    "minus infinity": (b'{"lr": [-Infinity]}', "-Infinity is no number"),
    "a number that overflows": (b'{"lr": 1e999}', "1e999 is too large"),
    "a negative number that overflows": (b'{"lr": -1e999}', "-1e999 is too large"),
    "a number of a million digits": (b'{"lr": ' + b"9" * 1_000_000 + b"}", "digits"),
    "a key twice": (b'{"step": 1, "step": 2}', "'step' is there twice"),
    "a key twice, spelled differently": (b'{"step": 1, "st\\u0065p": 2}', "'step' is there twice"),
    "a key twice, deep inside": (b'[{"a": {"b": 1, "c": 2, "b": 3}}]', "'b' is there twice"),
    "half a million keys, the last twice": (
        b"{" + b",".join(b'"%d":0' % (i % 79_999) for i in range(80_000)) + b"}", "'0' is there twice",
    ),
    "arrays 100,000 deep": (b"[" * 100_000, "deeper than 100 at offset 100"),
    "objects 100,000 deep": (b'{"a":' * 100_000, "deeper than 100 at offset 500"),
    "arrays 100,000 deep, and closed": (b"[" * 100_000 + b"]" * 100_000, "deeper than 100 at offset 100"),
    "depth hidden behind quotes in strings": (b'["\\"", "\\\\", ' + b"[" * 101, "deeper than 100 at offset 112"),
    "more bytes than allowed": (b'"' + b"x" * MAX_BYTES + b'"', f"{MAX_BYTES + 2} bytes where at most {MAX_BYTES}"),
    "nothing": (b"", "Expecting value"),
    "zeros": (b"\0" * 4096, "Expecting value"),
    "cut off": (b'{"step": 1, "posi', "Unterminated string"),
    "two documents": (b"{}\n{}", "Extra data"),
    "a comment": (b'{"step": 1} // or so', "Extra data"),
    "a trailing comma": (b'{"step": 1,}', "line 1 column"),
    "single quotes": (b"{'step': 1}", "line 1 column 2"),
    "bytes that are no UTF-8": (b'{"step": "\xff"}', "not UTF-8 text at offset 10"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "half a character": (b'{"name": "a\\\\\\ud83d"}', r"half a character \(\\ud8..\) at offset 13"),
}  # fmt: skip


def test_the_table_has_25_rows() -> None:
    assert len(HOSTILE) == 25


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_document_is_refused_by_name_at_once_and_in_little_memory(name: str, tmp_path: Path) -> None:
    data, words = HOSTILE[name]
    path = tmp_path / "layout.json"
    path.write_bytes(data)
    started_s = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(StoreCorrupt, match=words) as caught:
            read_json(path, max_bytes=MAX_BYTES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - started_s <= MAX_CPU_S
    assert peak <= MAX_EXTRA_BYTES
    assert str(path) in str(caught.value) and "Restore the file" in str(caught.value)


def test_a_file_of_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    with path.open("wb") as file:
        file.truncate(2**30)  # zeros that take no space
    tracemalloc.start()
    with pytest.raises(StoreCorrupt, match="1073741824 bytes"):
        read_json(path, max_bytes=MAX_BYTES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_depth_is_refused_even_where_the_interpreter_would_let_it_crash(tmp_path: Path) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**7)
    try:
        with pytest.raises(StoreCorrupt, match="deeper"):
            parse_json("[" * 1_000_000, where="a header")
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("depth", [1, 99, 100])
def test_nesting_up_to_the_limit_is_read(depth: int) -> None:
    assert parse_json("[" * depth + "1" + "]" * depth, where="here") is not None


def test_brackets_in_strings_and_side_by_side_do_not_count_as_depth() -> None:
    wanted = [["[{" * 500, '"', "\\", '\\"[[['], *([{}] * 500)]
    assert parse_json(json.dumps(wanted), where="here") == wanted


def test_a_large_document_is_read_quickly() -> None:
    text = json.dumps([{"name": f"layer.{i}", "shape": [i, 4]} for i in range(50_000)])
    started_s = time.process_time()
    parse_json(text, where="here")
    assert time.process_time() - started_s <= 4 * MAX_CPU_S, f"{len(text)} bytes"


def test_the_caller_chooses_the_error(tmp_path: Path) -> None:
    path = tmp_path / "marker.json"
    for data in (b"NaN", b"\xff", b" " * 100):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"marker\.json"):
            read_json(path, max_bytes=50, error=CheckpointError)


def test_a_file_that_is_not_there_or_is_a_pipe_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        read_json(tmp_path / "layout.json", max_bytes=MAX_BYTES)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a regular file"):
        read_json(tmp_path / "pipe", max_bytes=MAX_BYTES)


WHOLE_CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WHOLE_CHARACTERS
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WHOLE_CHARACTERS, inner, max_size=4)
)


@given(DOCUMENTS, st.booleans())
def test_what_is_not_hostile_is_read_as_the_standard_library_reads_it(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text, where="here") == json.loads(text) == value


@given(st.text(max_size=40) | st.text(st.sampled_from('[]{}",:\\u d83d0e1-nN'), max_size=60))
@settings(max_examples=500)
def test_any_text_gives_a_document_or_a_refusal(text: str) -> None:
    try:
        parse_json(text, where="here")
    except StoreCorrupt as error:
        assert "here" in str(error)


def test_what_was_written_is_read_back_and_is_sorted(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    value = {"step": 3, "lr": 0.1 + 0.2, "名": ["\U0001f642", None, True]}
    write_json(path, value)
    assert read_json(path, max_bytes=MAX_BYTES) == value
    assert list(json.loads(path.read_text())) == sorted(value)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_number_that_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    write_json(path, {"lr": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"lr": float("nan")})
    assert read_json(path, max_bytes=MAX_BYTES) == {"lr": 1}


# -- fields

RECORD = {"name": "a", "step": 3, "lr": 0.5, "ok": True, "shape": [1], "more": {"b": 1}, "none": None}


def fields(value: object = RECORD) -> Fields:
    return Fields(value, "x.json, units[2]")


def test_fields_of_the_right_types_are_given() -> None:
    found = fields()
    assert (found.text("name"), found.integer("step", least=3, most=3), found.number("lr")) == ("a", 3, 0.5)
    assert (found.flag("ok"), found.list("shape"), found.table("more"), found.number("step")) == (
        True,
        [1],
        {"b": 1},
        3,
    )


def test_optional_fields_may_be_missing_or_null() -> None:
    for name in ("none", "missing"):
        assert fields().text(name, optional=True) is None
        assert fields().flag(name, optional=True) is None
        assert fields().list(name, optional=True) == []
        assert fields().table(name, optional=True) == {}


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda f: f.text("missing"), "field `missing`: it is missing"),
        (lambda f: f.text("none"), "field `none`: it is null where a string should be"),
        (lambda f: f.text("step"), "field `step`: it is a whole number where a string"),
        (lambda f: f.integer("ok"), "field `ok`: it is true or false where a whole number"),
        (lambda f: f.integer("lr"), "field `lr`: it is a number where a whole number"),
        (lambda f: f.number("ok"), "field `ok`: it is true or false where a whole number or a number"),
        (lambda f: f.flag("step"), "field `step`"),
        (lambda f: f.list("more"), "field `more`: it is an object where an array"),
        (lambda f: f.table("shape", optional=True), "field `shape`: it is an array where an object"),
        (lambda f: f.integer("step", least=4), "field `step`: 3 is not at least 4"),
        (lambda f: f.integer("step", least=0, most=2), "field `step`: 3 is not at least 0 and at most 2"),
    ],
)
def test_a_wrong_field_is_named_with_its_place(read: Any, words: str) -> None:
    with pytest.raises(StoreCorrupt, match=re.escape(words)) as caught:
        read(fields())
    assert "x.json, units[2]" in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "text", 3, True])
def test_what_is_no_object_has_no_fields(value: object) -> None:
    with pytest.raises(StoreCorrupt, match="where an object should be"):
        fields(value)


def test_numbers_of_thousands_of_digits_are_refused_in_few_words() -> None:
    huge = fields({"n": 10**4000})
    for read in (lambda: huge.number("n"), lambda: huge.integer("n", most=7)):
        with pytest.raises(StoreCorrupt, match="field `n`") as caught:
            read()
        assert len(str(caught.value)) < 200
