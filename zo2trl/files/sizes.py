"""This module parses sizes in bytes as users write them, and formats them for messages.

Does not: decide what a size is used for.
"""

import re
from typing import Literal

from zo2trl.errors import ConfigError

__all__ = ["format_bytes", "parse_size"]

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B|([KMGT]?))\s*", re.IGNORECASE)


def parse_size(value: object, *, argument: str) -> int | Literal["auto", "min"]:
    """Parse "8GB" (8e9), "8GiB" (8 x 2^30), "512MB" or a plain count as bytes; return "auto" and "min" unchanged.

    Raises:
        ConfigError: the value is anything else, or a negative count; the message names the argument.
    """
    if isinstance(value, str):
        if value.lower() in ("auto", "min"):
            return "auto" if value.lower() == "auto" else "min"
        match = _SIZE.fullmatch(value)
        if match:
            prefix = (match[2] or match[4] or "").upper()
            scale = _UNITS[prefix] if not match[3] else 1024 ** " KMGT".index(prefix or " ")
            return int(float(match[1]) * scale)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and value % 1 == 0:
        return int(value)
    raise ConfigError(
        f'`{argument}` is {value!r}, which is not a size. Write bytes (8000000000), "8GB" (8e9 bytes), "8GiB" '
        '(8 x 2^30 bytes), "auto", or "min".'
    )


def format_bytes(n_bytes: float) -> str:
    """Format a size in short decimal units: 1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
