"""Every exception a user can meet, in one tree.

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
    ├── TraversalError                         the model did something the streamed traversal cannot serve
    ├── LossPrecisionError                 the loss came back in 16 bit, where a projected gradient drowns in rounding
    └── TrainingDiverged                   too many non-finite losses in a row

``raise`` is for the world, ``assert`` is for our own bugs.
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
    """Root of every error this package raises on purpose."""


class ConfigError(ZO2TRLError, ValueError):
    """An argument that cannot work."""


class BudgetError(ConfigError):
    """A byte budget that cannot hold what one step needs at once."""


class UnsupportedError(ConfigError):
    """A feature that forward-only training out of tiers cannot honour."""


class CheckpointError(ZO2TRLError):
    """A model folder that cannot be read safely or at all."""


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
    """For scripts: an error made for users is one line on stderr and exit code 2; any other keeps its traceback."""
    try:
        yield
    except ZO2TRLError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
