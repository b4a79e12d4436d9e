"""This module reads JSON strictly, because another program may have written it, or damaged it.

Does not: interpret a document; `Fields` only checks the type of a field.
Invariant: a refusal names file and field or offset, and comes before a number in the document sizes an allocation.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from zo2trl.errors import StoreCorrupt, ZO2TRLError
from zo2trl.files.fs import FS, LOCAL

__all__ = ["JSON", "Fields", "parse_json", "read_json", "write_json"]

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

MAX_DEPTH = 100
MAX_SHOWN = 400  # characters of a message, which may quote a value
_CURE = "Restore the file from a copy."
_PIECE_BYTES = 1 << 17
_STEPS = np.zeros(256, np.int64)
_STEPS[[ord("["), ord("{")]] = 1
_STEPS[[ord("]"), ord("}")]] = -1

# Characters beyond U+FFFF are spelled as two escapes; one of the two alone cannot be encoded in UTF-8.
_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    pass


def read_json(path: Path, *, max_bytes: int, fs: FS = LOCAL, error: type[ZO2TRLError] = StoreCorrupt) -> JSON:
    """Read the document in `path`.

    Raises:
        error: the file has more than `max_bytes` bytes, is not UTF-8 or not JSON, or has NaN or infinite numbers, half
            a surrogate pair, a key twice in one object, or nesting deeper than 100.
        StoreError: the file cannot be read.
    """
    fd = fs.open(path)
    try:
        n_bytes = fs.size(fd)
        if n_bytes > max_bytes:
            raise error(f"{path} has {n_bytes} bytes where at most {max_bytes} make sense. {_CURE}")
        data = bytearray(n_bytes)
        fs.read_at(fd, data, 0, path=path)
    finally:
        fs.close(fd)
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text at offset {problem.start}. {_CURE}") from problem
    return parse_json(text, where=str(path), error=error)


def parse_json(text: str, *, where: str, error: type[ZO2TRLError] = StoreCorrupt) -> JSON:
    """Parse the document in `text` as `read_json` does; `where` names its source in messages."""
    try:
        _refuse_depth(text)
        _refuse_halves(text)
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not JSON as this package writes it: {problem}. {_CURE}") from problem


def write_json(path: Path, value: Any, *, fs: FS = LOCAL) -> None:
    """Replace the document in `path`, durably and atomically."""
    fs.write_text_atomically(path, json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")) + "\n")


class Fields:
    """Fields reads the fields of one object by the type they must have; `where` is its place, for messages."""

    def __init__(self, value: object, where: str, *, error: type[ZO2TRLError] = StoreCorrupt) -> None:
        self.where, self._error = where, error
        if not isinstance(value, dict):
            raise error(f"{where} is {_kind(value)} where an object should be. {_CURE}")
        self.values: dict[str, Any] = value

    def refuse(self, name: str, why: str) -> ZO2TRLError:
        """Make the error about a field, which the caller raises."""
        shown = why if len(why) <= MAX_SHOWN else f"{why[:MAX_SHOWN]} ..."
        return self._error(f"{self.where}: field `{name}`: {shown}. {_CURE}")

    def text(self, name: str, *, optional: bool = False) -> Any:
        """Return a string; None if it is optional and missing or null."""
        return self._get(name, (str,), optional)

    def flag(self, name: str, *, optional: bool = False) -> Any:
        """Return true or false; None if it is optional and missing or null."""
        return self._get(name, (bool,), optional)

    def list(self, name: str, *, optional: bool = False) -> Any:
        """Return an array; an empty one if it is optional and missing or null."""
        return self._get(name, (list,), optional) or []

    def table(self, name: str, *, optional: bool = False) -> Any:
        """Return an object; an empty one if it is optional and missing or null."""
        return self._get(name, (dict,), optional) or {}

    def integer(self, name: str, *, least: int | None = None, most: int | None = None) -> int:
        """Return a whole number within bounds."""
        value: int = self._get(name, (int,), False)
        if (least is not None and value < least) or (most is not None and value > most):
            bounds = [f"at least {least}"] if least is not None else []
            bounds += [f"at most {most}"] if most is not None else []
            raise self.refuse(name, f"{_short(value)} is not {' and '.join(bounds)}")
        return value

    def number(self, name: str) -> float:
        """Return a finite number."""
        value = self._get(name, (int, float), False)
        try:
            return float(value)
        except OverflowError:
            raise self.refuse(name, "the number is too large") from None

    def _get(self, name: str, kinds: tuple[type, ...], optional: bool) -> Any:
        if name not in self.values:
            if optional:
                return None
            raise self.refuse(name, "it is missing")
        value = self.values[name]
        if type(value) not in kinds and not (optional and value is None):
            names = " or ".join(_NAMES[kind] for kind in kinds)
            raise self.refuse(name, f"it is {_kind(value)} where {names} should be")
        return value


_NAMES = {
    str: "a string", bool: "true or false", int: "a whole number", float: "a number", list: "an array",
    dict: "an object", type(None): "null",
}  # fmt: skip


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**40 else f"a number of {value.bit_length()} bits"


def _kind(value: object) -> str:
    return _NAMES.get(type(value), "something else")


def _without_escaped(text: str) -> str:
    """Blank out escaped backslashes and quotes; offsets stay."""
    return text.replace("\\\\", "  ").replace('\\"', "  ")


def _refuse_depth(text: str) -> None:
    """Refuse deep nesting before the recursive parser runs, by counting brackets outside of strings."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    data = _without_escaped(text).encode(errors="replace")
    depth = n_quotes = 0
    for start in range(0, len(data), _PIECE_BYTES):
        piece = np.frombuffer(data[start : start + _PIECE_BYTES], np.uint8)
        quotes = n_quotes + np.cumsum(piece == ord('"'))
        depths = depth + np.cumsum(np.where(quotes & 1, 0, _STEPS[piece]))
        if depths.max() > MAX_DEPTH:
            offset = start + int(np.argmax(depths > MAX_DEPTH))
            raise _Refused(f"it is nested deeper than {MAX_DEPTH} at offset {offset}")
        depth, n_quotes = int(depths[-1]), int(quotes[-1])


def _refuse_halves(text: str) -> None:
    if not _HALF.search(text):
        return
    half = _HALF.search(_PAIR.sub(lambda pair: " " * len(pair[0]), _without_escaped(text)))
    if half:
        raise _Refused(f"half a character ({half[0]}..) at offset {half.start()}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _Refused(f"the key {twice[:80]!r} is there twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"{text[:40]} is too large for a number")
    return value
