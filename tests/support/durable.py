"""A small store with units in every tier, opened the way an engine opens one; and what its weights have to be.

Does not: use a model. Units hold one or two noise tiles each, so that a store is opened in milliseconds.
"""

import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tests.support.stores import CPU, method, synthetic_layout
from zo2trl.engine.open_store import Mode, StoreSpec, open_store
from zo2trl.files.fs import FS, LOCAL
from zo2trl.layout.layout import Layout, TensorSpec
from zo2trl.planning.budgets import TierName
from zo2trl.planning.placement import Placement
from zo2trl.planning.write_schedule import WriteSchedule
from zo2trl.tiers.folder import StoreFolder
from zo2trl.tiers.store import TieredStore
from zo2trl.tiers.tier import carve
from zo2trl.zo.method import Method
from zo2trl.zo.records import Record, SkipRecord, StepRecord

Bytes = dict[str, bytes]  # tensor name -> its bytes, padding included


class QuickFS(FS):
    """Does not wait for the drive: for stores that no power cut will meet."""

    def sync_data(self, fd: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


def small_layout(*, by_leaf: bool = False, frozen: bool = False, root_tiles: int = 1) -> Layout:
    """Outside the blocks `root_tiles`, then blocks of one, two and one; `frozen` freezes the first block's tensor."""
    layout = synthetic_layout([[1], [1, 1] if by_leaf else [2], [1]], root_tiles=root_tiles)
    if frozen:
        layout = _freeze(layout, "t1")
    return replace(layout, leaf_blocks=frozenset({"block2"} if by_leaf else ()))


def _freeze(layout: Layout, name: str) -> Layout:
    def still(spec: TensorSpec) -> TensorSpec:
        return replace(spec, trainable=spec.trainable and spec.name != name)

    units = {unit.index: replace(unit, tensors=tuple(still(spec) for spec in unit.tensors)) for unit in layout.units}
    points = tuple(
        replace(point, segments=tuple(
            replace(segment, unit=units[segment.unit.index], tensors=tuple(map(still, segment.tensors)),
                    spans=segment.spans if all(still(spec).trainable for spec in segment.tensors) else ())
            for segment in point.segments
        ))
        for point in layout.points
    )  # fmt: skip
    return replace(layout, units=tuple(units.values()), points=points)


def base_weights(spec: TensorSpec, *, seed: int = 0) -> torch.Tensor:
    """Return the weights that a run begins with."""
    draw = torch.Generator().manual_seed(seed * 1000 + spec.tensor_id)
    return torch.randint(-64, 65, spec.shape, generator=draw).to(spec.dtype) / 8


@dataclass(frozen=True)
class Setup:
    """A Setup holds the options with which a small store is opened."""

    layout: Layout = field(default_factory=small_layout)
    tiers: tuple[TierName, ...] = ("gpu", "cpu", "disk", "disk")
    keep_base: bool = True
    write_back: int = 2
    snapshot: int = 3
    sync_every: int = 1
    method: Method = field(default_factory=method)

    def open(self, path: Path, *, mode: Mode = "begin", fs: FS = LOCAL, seed: int = 0) -> TieredStore:
        """Open the store in `path`, as `open_engine` would."""
        digest = self.layout.digest()
        if mode == "read":
            folder = StoreFolder.look(path, layout_digest=digest, fs=fs)
        else:
            folder = StoreFolder.own(path, layout_digest=digest, fs=fs)
        try:
            if mode == "continue" and not folder.recall_run():
                raise FileNotFoundError(f"no run in {path}")
            return open_store(folder, self.run(), lambda spec: base_weights(spec, seed=seed), mode=mode, fs=fs)
        except BaseException:
            folder.close()
            raise

    @contextmanager
    def opened(self, path: Path, *, mode: Mode = "begin", fs: FS = LOCAL) -> Iterator[TieredStore]:
        """The same, closed at the end of the block."""
        store = self.open(path, mode=mode, fs=fs)
        try:
            yield store
        finally:
            store.close()

    def run(self) -> StoreSpec:
        """What `open_store` asks for."""
        every: dict[TierName, int] = {"cpu": self.write_back, "disk": self.write_back}
        return StoreSpec(
            layout=self.layout, placement=self.placement(), method=self.method, device=CPU,
            write_schedule=WriteSchedule(write_back=every, snapshot=self.snapshot), facts={"decays": [], "seed": 0},
            base_folder=None if self.keep_base else "somewhere", sync_every=self.sync_every,
            describe=lambda folder: None,
        )  # fmt: skip

    def placement(self) -> Placement:
        """Every unit where `tiers` says."""
        tier_of = {unit.index: tier for unit, tier in zip(self.layout.units, self.tiers, strict=True)}
        streamed = [s.n_bytes for s in self.layout.segments if tier_of[s.unit.index] != "gpu"]
        return Placement(
            tier_of=tier_of, ring_bytes=2 * max(streamed, default=0), largest_segment_bytes=max(streamed, default=0),
            scratch_bytes=0, scratch_copies=1, device_bytes=0, cpu_bytes=0,
        )  # fmt: skip


class State(NamedTuple):
    """A State is the content of a store that a user can observe."""

    records: tuple[Record, ...]
    weights: str  # SHA-256

    def __str__(self) -> str:
        return f"{len(self.records)} records, weights {self.weights[:8]}"


class Reference:
    """The same store as a dictionary and a list, brought forward one record at a time: nothing in it can be lost."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.records: list[Record] = []
        self._weights = [{spec.name: _padded(spec, base_weights(spec)) for spec in _tensors(setup.layout)}]

    def append(self, record: Record) -> None:
        """A step."""
        self.records.append(record)
        self._weights.append(dict(self._weights[-1]))
        for segment in self._setup.layout.segments:
            if not segment.is_trainable:
                continue
            flat = torch.frombuffer(
                bytearray(b"".join(self._weights[-1][spec.name] for spec in segment.tensors)), dtype=torch.uint8
            )
            self._setup.method.replay(flat, segment.spans, [record])
            for spec in segment.tensors:
                start = spec.byte_offset - segment.byte_start
                self._weights[-1][spec.name] = flat[start : start + spec.n_padded_bytes].numpy().tobytes()

    def replace(self, seed: int) -> None:
        """Weights from outside."""
        self._weights[-1] = {spec.name: _padded(spec, base_weights(spec, seed=seed)) for spec in _tensors(
            self._setup.layout)}  # fmt: skip

    def rewind(self, position: int) -> None:
        """Rewind to an earlier position."""
        del self.records[position:], self._weights[position + 1 :]

    def copy(self) -> "Reference":
        """Return an independent copy."""
        other = Reference(self._setup)
        other.records, other._weights = list(self.records), list(self._weights)
        return other

    @property
    def weights(self) -> Bytes:
        """Tensor name -> bytes, now."""
        return self._weights[-1]

    def state(self) -> State:
        """Now."""
        return State(tuple(self.records), digest_of(self.weights))


def digest_of(weights: Bytes) -> str:
    """SHA-256 of all tensors in the order of their names."""
    hashed = hashlib.sha256()
    for name in sorted(weights):
        hashed.update(weights[name])
    return hashed.hexdigest()


def _tensors(layout: Layout) -> list[TensorSpec]:
    return [spec for unit in layout.units for spec in unit.tensors]


def _padded(spec: TensorSpec, values: torch.Tensor) -> bytes:
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes().ljust(spec.n_padded_bytes, b"\0")


def make_record(step: int, *, directions: int = 1, seed: int | None = None) -> StepRecord:
    """A step whose effect on the weights is plain to see."""
    draw = random.Random(step if seed is None else seed)
    return StepRecord(
        step=step, seed=draw.getrandbits(64),
        coefficients=tuple(draw.choice([-2.0, 0.5, 1.25]) for _ in range(directions)),
        learning_rate=0.125, weight_decay=0.0, zo_eps=1e-3, losses=(1.0, 0.5), scalars=(1.0,),
    )  # fmt: skip


def make_skip(step: int) -> SkipRecord:
    """A step whose loss was not finite."""
    return SkipRecord(step=step, seed=step, losses=(float("inf"), 1.0))


def visit(store: TieredStore) -> Bytes:
    """One traversal over every point: what was lent."""
    lent: Bytes = {}
    for point in store.layout.points:
        with store.lease_clean(point) as weights:
            for segment, buffer in zip(point.segments, weights, strict=True):
                for spec in segment.tensors:
                    start = spec.byte_offset - segment.byte_start
                    lent[spec.name] = buffer[start : start + spec.n_padded_bytes].numpy().tobytes()
    store.end_traversal()
    return lent


def state_of(store: TieredStore) -> State:
    """What a store holds."""
    return State(tuple(store.journal.records), digest_of(visit(store)))


def listing(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return all properties of a folder's files that a reader must not change."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_size, path.stat().st_mtime_ns,
            hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


# -- workloads

Kind = Literal["step", "skip", "visit", "flush", "settle", "replace", "change", "back", "reopen", "begin"]


class Action(NamedTuple):
    """One thing a run does."""

    kind: Kind
    number: int = 0
    directions: int = 1

    def record(self) -> Record:
        """Of a step."""
        if self.kind == "skip":
            return make_skip(self.number)
        return make_record(self.number, directions=self.directions)


def steps(first: int, last: int, *, visits: bool = True) -> list[Action]:
    """Training: each step is followed by a traversal that absorbs it."""
    actions: list[Action] = []
    for number in range(first, last + 1):
        actions.append(Action("skip" if number % 5 == 4 else "step", number, directions=1 + 3 * (number % 3)))
        actions += [Action("visit")] if visits else []
    return actions


class Oracle:
    """An Oracle has the states that a store may be in after each action, in order."""

    def __init__(self, setup: Setup) -> None:
        self.reference = Reference(setup)
        self._setup = setup
        self._new_run: Reference | None = None  # was begun, and does not count before its first step
        self._shown: Reference | None = None  # the past, which is shown and does not count before the next step
        self.states: list[State] = [self.reference.state()]
        self.promises = [0]
        """The state that is durable after each action, the opening first."""

    @property
    def current(self) -> Reference:
        """What the store shows, which may not count yet."""
        return self._shown or self._new_run or self.reference

    def do(self, action: Action) -> None:
        """An action was done."""
        kind = action.kind
        if kind in ("step", "skip", "replace", "change"):
            if self._shown is not None:
                # Between giving the later steps up and making the new one, the store is where it went back to.
                self.states.append(self._shown.state())
            self.reference, self._new_run, self._shown = self.current, None, None
            if kind in ("step", "skip"):
                self.reference.append(action.record())
            else:
                self.reference.replace(action.number)
        elif kind == "back":
            self._shown = self.current.copy()
            self._shown.rewind(action.number)
        elif kind in ("reopen", "begin"):
            self._shown, self._new_run = None, Reference(self._setup) if kind == "begin" else None
        if self.states[-1] != self.reference.state():
            self.states.append(self.reference.state())
        self.promises.append(len(self.states) - 1)

    def copy(self) -> "Oracle":
        """Return an independent copy."""
        other = copy.copy(self)
        other.reference = self.reference.copy()
        other._new_run = self._new_run and self._new_run.copy()
        other._shown = self._shown and self._shown.copy()
        other.states, other.promises = list(self.states), list(self.promises)
        return other


class Player:
    """Plays actions on a store, each inside `around()`, with the oracle beside it; `promised` is called after each."""

    def __init__(
        self,
        setup: Setup,
        path: Path,
        *,
        fs: FS = LOCAL,
        promised: Callable[[object], None] = lambda done: None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.setup, self.path, self.fs, self._promised, self._around = setup, path, fs, promised, around
        self.oracle = Oracle(setup)
        with around():
            self.store = setup.open(path, fs=fs)
        promised("open")

    def play(self, actions: Sequence[Action]) -> None:
        """All of them, in order."""
        for action in actions:
            with self._around():
                self._do(action)
            self.oracle.do(action)
            self._promised(str(action))

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _do(self, action: Action) -> None:
        if action.kind == "visit":
            assert digest_of(visit(self.store)) == digest_of(self.oracle.current.weights)
        elif action.kind in ("reopen", "begin"):
            self.store.close()
            self.store = self.setup.open(
                self.path, mode="continue" if action.kind == "reopen" else "begin", fs=self.fs
            )
        else:
            act(self.store, action)


def act(store: TieredStore, action: Action) -> None:
    """Apply an action to an open store."""
    if action.kind in ("step", "skip"):
        store.append(action.record())
    elif action.kind == "visit":
        visit(store)
    elif action.kind == "flush":
        store.flush()
    elif action.kind == "settle":
        store.settle()
    elif action.kind == "replace":
        store.replace(lambda spec: base_weights(spec, seed=action.number))
    elif action.kind == "change":
        store.flush()  # a pending write of a home may move it while the test writes into it
        for unit in store.layout.units:
            view, _ = store.view(unit)
            for spec in unit.tensors:
                carve(view, spec).copy_(base_weights(spec, seed=action.number))
        store.commit_changes(store.layout.units)
    else:
        assert action.kind == "back", action.kind
        store.go_back(action.number, base=base_weights)
