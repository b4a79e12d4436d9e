"""This module defines every exception that a user can get, in one tree.

::

    ZO2TRLError
    ├── ConfigError (also ValueError)      an argument cannot work; the message names it and the way out
    │   ├── BudgetError                    byte budgets cannot hold what a step needs at once
    │   └── UnsupportedError               a feature forward-only training cannot honour (DeepSpeed, ...)
    ├── CheckpointError                    a model folder that cannot be read (pickled weights, stray paths, ...)
    ├── StoreError                         something is wrong with a parameter store on disk
    │   ├── StoreForeign                   the folder holds something that is not this model's store
    │   ├── StoreLocked                    another process owns the store
    │   ├── StoreCorrupt                   bytes on disk are not what was written; names file, offset and cure
    │   └── ShortRead                      a file ended before the bytes asked for
    ├── ParallelError                      the processes of one training cannot go on together
    │   ├── RankLost                       one of them has ended, or does not answer
    │   └── RanksDiverged                  they do not hold the same weights, or do not do the same
    ├── TraversalError                     the model did something the streamed traversal cannot serve
    ├── LossPrecisionError                 the loss came back in 16 bit, where a projected gradient drowns in rounding
    └── TrainingDiverged                   too many non-finite losses in a row

``raise`` reports wrong input or a failing system; ``assert`` reports a bug of this package.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "LossPrecisionError",
    "ParallelError",
    "RankLost",
    "RanksDiverged",
    "ShortRead",
    "StoreCorrupt",
    "StoreError",
    "StoreForeign",
    "StoreLocked",
    "TrainingDiverged",
    "TraversalError",
    "UnsupportedError",
    "ZO2TRLError",
    "errors_in_one_line",
]


class ZO2TRLError(Exception):
    """This is the base class of every error that this package raises on purpose."""


class ConfigError(ZO2TRLError, ValueError):
    """An argument cannot work."""


class BudgetError(ConfigError):
    """A byte budget cannot hold what one step needs at once."""


class UnsupportedError(ConfigError):
    """Forward-only training out of tiers cannot honour a feature."""


class CheckpointError(ZO2TRLError):
    """A model folder cannot be read safely or at all."""


class StoreError(ZO2TRLError):
    """Something is wrong with a parameter store on disk."""


class StoreForeign(StoreError):
    """The folder holds something that is not a store of this model."""


class StoreLocked(StoreError):
    """Another process owns the store."""


class StoreCorrupt(StoreError):
    """Bytes on disk are not what was written."""


class ShortRead(StoreError):
    """A file ended before the bytes asked for."""


class ParallelError(ZO2TRLError):
    """The processes of one training cannot go on together."""


class RankLost(ParallelError):
    """Another process of the training has ended, or does not answer."""


class RanksDiverged(ParallelError):
    """The processes of one training do not hold the same weights, or do not do the same."""


class TraversalError(ZO2TRLError):
    """The model did something a streamed traversal cannot serve."""


class LossPrecisionError(ZO2TRLError):
    """The loss is a 16-bit number: a projected gradient would drown in its rounding."""


class TrainingDiverged(ZO2TRLError):
    """Too many non-finite losses in a row."""


@contextmanager
def errors_in_one_line(program: str) -> Generator[None]:
    """Print a `ZO2TRLError` of a script as one line and exit with code 2; any other error keeps its traceback."""
    try:
        yield
    except ZO2TRLError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
