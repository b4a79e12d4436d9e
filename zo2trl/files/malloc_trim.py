"""This module returns memory to the system that the C library keeps after passes have freed it.

Does not: free memory that is in use, or track who used it.
Invariant: where the C library has no such call, nothing happens.

Tensors on a CPU come from posix_memalign, and glibc before 2.38 does not find a hole that it once freed as soon as a
few bytes at its edge belong to another allocation: it takes new memory for the same tensor again (sourceware bug
14581). Temporaries under 32 MiB, such as a head's logits, thus made a process of 170 MB hold another 480 MB after
twenty steps. Trimming returns the pages of the holes; their address space stays lost.
"""

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["return_free_pages"]


def return_free_pages() -> None:
    """Return the pages of all freed memory of this process to the system, which takes milliseconds."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
