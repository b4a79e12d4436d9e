"""The logbook: what a run measured and cannot measure again by replay (evaluations, metrics of steps).

Does not: hold anything that weights depend on; that is the journal's.

A line is the CRC32 of a JSON text in hex, a space, the text. A line that does not check ends the book: it was being
written when the machine stopped, and so was everything behind it.
Invariant: entries are keyed by journal position, and those of an abandoned history are gone.
"""

import json
import zlib
from pathlib import Path
from typing import Any, Self

from zo2trl.files.fs import FS, LOCAL

__all__ = ["Logbook"]

MAX_BYTES = 1 << 32


class Logbook:
    """One open logbook; make one with `open`, and close it."""

    damaged_at: int | None
    """Byte offset from which on lines did not check when the book was opened."""

    def __init__(self, path: Path, fd: int, *, fs: FS) -> None:
        self.path, self._fs = path, fs
        self._fd: int | None = fd
        self._entries: dict[tuple[str, str], dict[int, Any]] = {}  # (kind, name) -> position -> value
        self._end = 0
        self.damaged_at = None

    @classmethod
    def open(cls, path: Path, *, fs: FS = LOCAL, read_only: bool = False) -> Self:
        """Read a book, made if missing. Lines behind damage are blanked out, unless `read_only`."""
        if not read_only and not fs.exists(path):
            fs.close(fs.create(path, 0))
            fs.sync_folder(path.parent)
        book = cls(path, fs.open(path, write=not read_only), fs=fs)
        try:
            book._load(read_only=read_only)
        except BaseException:
            book.close()
            raise
        return book

    @classmethod
    def blank(cls, path: Path, *, fs: FS = LOCAL) -> Self:
        """A book without entries that takes none: for those who only look at weights."""
        book = cls(path, -1, fs=fs)
        book._fd = None
        return book

    def get(self, kind: str, position: int, *, name: str = "") -> Any:
        """An entry's value, or None."""
        return self._entries.get((kind, name), {}).get(position)

    def has(self, kind: str, position: int) -> bool:
        """Whether there is an entry of a kind at a position, whatever its name."""
        return any(position in values for (found, _), values in self._entries.items() if found == kind)

    def put(self, kind: str, position: int, value: Any, *, name: str = "", sync: bool = False) -> None:
        """Add an entry; with `sync` it survives a power cut, and so do all before it."""
        assert self._fd is not None, "the logbook is closed"
        text = json.dumps([kind, position, name, value], separators=(",", ":"))
        line = b"%08x %s\n" % (zlib.crc32(text.encode()), text.encode())
        self._fs.write_at(self._fd, line, self._end)
        self._end += len(line)
        if sync:
            self._fs.sync_data(self._fd)
        self._note(json.loads(text))  # what a reader would get: tuples are lists from here on

    def forget_beyond(self, position: int) -> None:
        """Entries of steps that the journal has lost (a power cut between syncs) are not those of the next ones."""
        if any(key > position for values in self._entries.values() for key in values):
            self.rewind(position)

    def rewind(self, position: int) -> None:
        """Forget entries beyond a position."""
        self.put("rewound", position, None, sync=True)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._fs.close(fd)

    def _load(self, *, read_only: bool) -> None:
        assert self._fd is not None
        raw = bytearray(min(self._fs.size(self._fd), MAX_BYTES))
        self._fs.read_at(self._fd, raw, 0, path=self.path)
        for line in bytes(raw).splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                break
            self._note(entry)
            self._end += len(line)
        rest = bytes(raw[self._end :])
        if rest.strip(b"\n\0"):
            self.damaged_at = self._end
            if not read_only:
                self._fs.write_at(self._fd, b"\n" * len(rest), self._end)
                self._fs.sync_data(self._fd)

    def _note(self, entry: list[Any]) -> None:
        kind, position, name, value = entry
        if kind == "rewound":
            for values in self._entries.values():
                for later in [key for key in values if key > position]:
                    del values[later]
        elif kind:
            self._entries.setdefault((kind, name), {})[position] = value


def _parse(line: bytes) -> list[Any] | None:
    if line == b"\n":
        return ["", 0, "", None]
    try:
        crc, text = int(line[:8], 16), line[9:-1]
        if line[8:9] != b" " or line[-1:] != b"\n" or zlib.crc32(text) != crc:
            return None
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_entry = isinstance(entry, list) and [type(part) for part in entry[:3]] == [str, int, str] and len(entry) == 4
    return entry if is_entry else None
