"""Giving memory back that the C library keeps: what passes freed, and nobody holds.

Does not: free anything that is used, or know who used it.
Invariant: where the C library has no such call, nothing happens.

Tensors on a CPU come from posix_memalign, and glibc before 2.38 does not find a hole that it once freed as soon as a
few bytes at its edge belong to somebody else: it takes new memory for the same tensor again (sourceware bug 14581).
Temporaries under 32 MiB, as a head's logits are, so made a process of 170 MB hold another 480 MB after twenty steps.
The address space stays lost; the pages of the holes need not.
"""

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["return_free_pages"]


def return_free_pages() -> None:
    """Hand the pages of all free memory of this process to the system; takes milliseconds."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
