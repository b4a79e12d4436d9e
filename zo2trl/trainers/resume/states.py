"""State of random generators, schedulers and optimizers as JSON files, and back.

Does not: pickle, or hold tensors: what such states consist of here is numbers, texts and containers of them.

Invariants:
- What is read back equals what was written, to the last bit of a float and the kind of a container.
- A state is checked as a whole before any of it is applied: numpy reads beyond its memory if told to.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.scheduler import AcceleratedScheduler

from zo2trl.errors import CheckpointError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.strict_json import JSON, Fields, read_json, write_json

__all__ = [
    "OPTIMIZER_NAME", "RNG_NAME", "SCHEDULER_NAME", "decode_state", "encode_state", "read_rng", "read_schedule",
    "rng_state", "set_rng_state", "write_rng", "write_schedule",
]  # fmt: skip

RNG_NAME = "rng_state.json"
OPTIMIZER_NAME = "optimizer.json"
SCHEDULER_NAME = "scheduler.json"
MAX_JSON_BYTES = 64 * 2**20
MAX_DEPTH = 20  # nested containers; each takes a few levels of JSON
MAX_INTEGER_BITS = 10_000  # as many as the standard library reads back
CURE = "Resume from another checkpoint, or from the journal alone with `resume_from_checkpoint=True`."

_WORDS, _NUMPY_KIND = 624, "MT19937"


# -- random numbers


def rng_state() -> dict[str, JSON]:
    """State of Python's, numpy's and torch's global generators."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()] if _has_cuda() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": list[JSON](cuda),
    }


def set_rng_state(state: object, *, where: Path | str) -> None:
    """Bring back what `rng_state` returned. GPUs are left alone unless there are as many as then.

    Raises:
        CheckpointError: `state` is not that; names the field, and nothing was changed.
    """
    fields = Fields(state, str(where), error=CheckpointError)
    python = _parts(fields, "python", 3)
    words, gauss = _words(fields, "python", python[1], _WORDS + 1), python[2]
    kind, keys, position, has_gauss, cached = _parts(fields, "numpy", 5)
    keys = _words(fields, "numpy", keys, _WORDS)
    if python[0] != random.getstate()[0] or words[-1] > _WORDS or type(gauss) not in (float, type(None)):
        raise fields.refuse("python", "it is not a state of the generator of this Python")
    if kind != _NUMPY_KIND or not _is_between(position, _WORDS) or not _is_between(has_gauss, 1):
        raise fields.refuse("numpy", f"it is not a state of {_NUMPY_KIND}")
    if type(cached) is not float:
        raise fields.refuse("numpy", "its cached number is none")
    cpu = _tensor(fields, "torch", fields.text("torch"), torch.Generator())
    devices = [_tensor(fields, "cuda", text, None) for text in fields.list("cuda")]
    random.setstate((python[0], tuple(words), gauss))
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(cpu)
    if _has_cuda() and len(devices) == torch.cuda.device_count():
        try:
            torch.cuda.set_rng_state_all(devices)
        except (RuntimeError, TypeError) as error:
            raise fields.refuse("cuda", str(error)) from error


def write_rng(path: Path, *, fs: FS = LOCAL) -> None:
    """Write the global generators' state."""
    write_json(path, rng_state(), fs=fs)


def read_rng(path: Path, *, fs: FS = LOCAL) -> None:
    """Bring the global generators' state back; see `set_rng_state`."""
    set_rng_state(_read(path, fs), where=path)


def _parts(fields: Fields, name: str, n_parts: int) -> list[Any]:
    parts = fields.list(name)
    if len(parts) != n_parts:
        raise fields.refuse(name, f"it has {len(parts)} parts instead of {n_parts}")
    return parts


def _words(fields: Fields, name: str, words: object, n_words: int) -> list[int]:
    if not isinstance(words, list) or len(words) != n_words or not all(_is_between(w, 2**32 - 1) for w in words):
        raise fields.refuse(name, f"it does not hold {n_words} numbers of 32 bits")
    return words


def _is_between(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _tensor(fields: Fields, name: str, text: object, generator: torch.Generator | None) -> torch.Tensor:
    try:
        data = bytearray.fromhex(text if isinstance(text, str) else "no text")
        state = torch.frombuffer(data, dtype=torch.uint8)
        if generator is not None:
            generator.set_state(state)  # which checks it
    except (ValueError, RuntimeError, TypeError) as error:
        raise fields.refuse(name, f"it is not a generator's state in hexadecimal digits ({error})") from error
    return state


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


# -- schedules


def write_schedule(folder: Path, optimizer: Any, scheduler: Any, *, fs: FS = LOCAL) -> None:
    """Write the numbers in an optimizer's parameter groups, and a scheduler's state."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    state = scheduler.state_dict()
    write_json(folder / OPTIMIZER_NAME, {"param_groups": encode_state(groups, where="param_groups")}, fs=fs)
    content = {"class": _class_of(scheduler), "state": encode_state(state, where=_class_of(scheduler))}
    write_json(folder / SCHEDULER_NAME, content, fs=fs)


def read_schedule(folder: Path, optimizer: Any, scheduler: Any, *, fs: FS = LOCAL) -> None:
    """Bring both back.

    Raises:
        CheckpointError: damage, or an optimizer or a schedule of another kind than then.
    """
    path = folder / OPTIMIZER_NAME
    groups = _state(Fields(_read(path, fs), str(path), error=CheckpointError), "param_groups")
    now = optimizer.param_groups
    if not isinstance(groups, list) or len(groups) != len(now):
        raise CheckpointError(f"{path} is of another optimizer: this one has {len(now)} parameter groups. {CURE}")
    for index, (saved, group) in enumerate(zip(groups, now, strict=True)):
        where = f"{path}: param_groups[{index}]"
        _refuse_names(saved, lambda name: name == "params" or name not in group, where=where)  # noqa: B023
        _refuse_other_kind(saved, group, where=where, n_groups=len(now))
    path = folder / SCHEDULER_NAME
    fields, known = Fields(_read(path, fs), str(path), error=CheckpointError), scheduler.state_dict()
    if (kind := fields.text("class")) != _class_of(scheduler):
        raise CheckpointError(
            f"{path} is the state of a {kind[:80]}, and this run has a {_class_of(scheduler)}: resume with the "
            "`lr_scheduler_type` of the checkpoint, or start a new run."
        )
    state = _state(fields, "state")
    # Loading is `__dict__.update`, so a name of a method would replace it.
    _refuse_names(
        state, lambda name: hasattr(_unwrapped(scheduler), name) and name not in known, where=f"{path}: state"
    )
    _refuse_other_kind(state, known, where=f"{path}: state", n_groups=len(now))
    for saved, group in zip(groups, now, strict=True):
        group.update(saved)
    try:
        scheduler.load_state_dict(state)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit a {kind} ({type(error).__name__}: {error}). {CURE}") from error


def _read(path: Path, fs: FS) -> JSON:
    return read_json(path, max_bytes=MAX_JSON_BYTES, fs=fs, error=CheckpointError)


def _state(fields: Fields, name: str) -> Any:
    if name not in fields.values:
        raise fields.refuse(name, "it is missing")
    return decode_state(fields.values[name], where=f"{fields.where}: {name}")


def _class_of(scheduler: Any) -> str:
    return type(_unwrapped(scheduler)).__name__


def _unwrapped(scheduler: Any) -> Any:
    return scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler


def _refuse_names(saved: object, is_bad: Callable[[Any], bool], *, where: str) -> None:
    if not isinstance(saved, dict):
        raise CheckpointError(f"{where} is no table of values by name. {CURE}")
    if bad := [name for name in saved if not isinstance(name, str) or is_bad(name)]:
        raise CheckpointError(f"{where} has {str(bad[0])[:80]!r}, which this run does not have. {CURE}")


def _refuse_other_kind(saved: object, now: object, *, where: str, n_groups: int) -> None:
    """Another kind of value than there is now, or values for other groups, would fail much later and say less."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in saved.keys() & now.keys():
            _refuse_other_kind(saved[key], now[key], where=f"{where}[{key!r}]", n_groups=n_groups)
    elif isinstance(saved, list | tuple) and isinstance(now, list | tuple):
        if len(now) == n_groups != len(saved):
            raise CheckpointError(f"{where} has {len(saved)} values for {n_groups} parameter groups. {CURE}")
        if len(saved) == len(now):
            for index, (one, other) in enumerate(zip(saved, now, strict=True)):
                _refuse_other_kind(one, other, where=f"{where}[{index}]", n_groups=n_groups)
    elif saved is not None and now is not None and _kind(saved) != _kind(now):
        raise CheckpointError(f"{where} is {_kind(saved)}, and {_kind(now)} in this run. {CURE}")


def _kind(value: object) -> str:
    names = {str: "a text", list: "a sequence", tuple: "a sequence", dict: "a table"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")


# -- values


def encode_state(value: Any, *, where: str) -> JSON:
    """Plain Python values as JSON that `decode_state` turns back into equal ones of the same kinds.

    Raises:
        CheckpointError: anything but None, booleans, numbers, texts, lists, tuples, dictionaries and counters.
    """
    return _encode(value, where, 0)


def _encode(value: Any, where: str, depth: int) -> JSON:
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and _is_whole(value):
        return str.__str__(value)
    if isinstance(value, int) and value.bit_length() <= MAX_INTEGER_BITS:
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, (list, tuple, Mapping)) and depth < MAX_DEPTH:
        return _encode_container(value, where, depth + 1)
    raise CheckpointError(
        f"{where} is {_shown(value)}, which cannot be written to a checkpoint without pickling it. Use a schedule "
        "whose state is numbers, or `save_strategy='no'`: the journal alone is enough to resume."
    )


def _encode_container(value: Any, where: str, depth: int) -> JSON:
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{where}[{index}]", depth) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    rows: list[JSON] = [
        [_encode(key, f"a key of {where}", depth), _encode(item, f"{where}[{key!r}]", depth)]
        for key, item in value.items()
    ]
    return {"counter" if isinstance(value, Counter) else "dict": rows}


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple, Mapping)):
        return f"nested deeper than {MAX_DEPTH}"
    return f"a {type(value).__name__}" + (" that no file can hold" if isinstance(value, (int, str)) else "")


def decode_state(value: JSON, *, where: str) -> Any:
    """What `encode_state` was given. Raises `CheckpointError` if it was not that which wrote `value`."""
    if isinstance(value, list):
        return [decode_state(item, where=where) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "float" and content in ("nan", "inf", "-inf"):
            return float(str(content))
        if kind == "tuple" and isinstance(content, list):
            return tuple(decode_state(item, where=where) for item in content)
        if kind in _TABLES and isinstance(content, list) and all(isinstance(r, list) and len(r) == 2 for r in content):
            rows: Any = content
            try:
                return _TABLES[kind]({decode_state(k, where=where): decode_state(v, where=where) for k, v in rows})
            except TypeError:  # a key that no dictionary can have
                pass
    raise CheckpointError(f"{where}: {json.dumps(value)[:80]} is no state that this package wrote. {CURE}")


_TABLES: dict[str, Callable[[dict[Any, Any]], dict[Any, Any]]] = {"dict": dict, "counter": Counter}
