"""Method: direction x estimator x update, made in one registry from one identity string.

A method brings weights forward over records and makes the perturbed weights of probes. It works on flat byte buffers,
so that one call covers a whole unit, and does not know what a model, a tier or a file is.

The identity is in a journal's header: "<direction> | <estimator> | <update>". Equal identities give equal bits from
equal records. `METHODS` names the parts that there are; a new one is entered there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from zo2trl.zo.chunks import chunks, draw
from zo2trl.zo.estimators import Estimator, TwoSidedSPSA
from zo2trl.zo.kernels.registry import FusedVisit, fused_visit
from zo2trl.zo.mezo import MezoNoise
from zo2trl.zo.noise import Direction, Gaussian, Rademacher, make_direction
from zo2trl.zo.records import Record, StepRecord
from zo2trl.zo.rounding import Rounding
from zo2trl.zo.tiles import Perturbed, Span, TileMap
from zo2trl.zo.updates import SGD, Update

__all__ = [
    "ARGUMENTS",
    "METHODS",
    "DrawnOtherwise",
    "Method",
    "UnknownPart",
    "differing_part",
    "make_method",
    "method_of",
]

_SEPARATOR = " | "
_MEZO = "mezo/"


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a run looks for a slope and follows it.

    Args:
        is_fused: use a kernel that makes a whole visit in one pass over the weights, where there is one for the
            direction and the update; if not, the generic path on torch serves, and gives the same bits.
    """

    direction: Direction
    estimator: Estimator
    update: Update
    is_fused: bool = True
    _fused: FusedVisit | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fused = fused_visit(self.direction.identity, self.update.identity) if self.is_fused else None
        object.__setattr__(self, "_fused", fused)

    @property
    def identity(self) -> str:
        """The parts' names, for the journal's header."""
        return _SEPARATOR.join((self.direction.identity, self.estimator.identity, self.update.identity))

    def visit(
        self,
        weights: torch.Tensor,
        spans: Sequence[Span],
        records: Sequence[Record],
        *,
        probes: Sequence[Perturbed] = (),
        keep: bool = True,
    ) -> bool:
        """Bring clean weights forward over `records`, rounding after each step, and make up to two probes of them.

        All buffers are uint8 on one device; bytes outside the spans (frozen tensors) are neither read nor written.
        How many records one call brings them over never shows in the bits, so lazy equals eager.

        Args:
            weights: clean bytes.
            probes: along one direction; the last may write into `weights` itself, which leaves no clean ones.
            keep: whether `weights` must hold the clean result afterwards. If not, storing it may be saved.

        Returns:
            Whether `weights` hold the clean result; if not, they are unchanged, or perturbed by the last probe.
        """
        assert len({probe.seed for probe in probes}) <= 1, "probes of one call share their direction"
        steps = [record for record in records if isinstance(record, StepRecord)]
        in_place = any(probe.into.data_ptr() == weights.data_ptr() for probe in probes)
        if weights.is_cuda and self._fused is not None:
            return self._fused(weights, spans, steps, probes=probes, keep=keep, in_place=in_place)
        for span in spans if steps or probes else ():
            self._visit_span(weights, span, steps, probes=probes)
        return keep or not in_place

    def replay(self, weights: torch.Tensor, spans: Sequence[Span], records: Sequence[Record]) -> None:
        """Bring clean weights forward over `records`, in place."""
        self.visit(weights, spans, records)

    def _visit_span(
        self, weights: torch.Tensor, span: Span, steps: Sequence[StepRecord], *, probes: Sequence[Perturbed]
    ) -> None:
        flat = span.view(weights)
        for tiles, run in chunks(span.tiles, weights.device):
            for record in steps:
                self.update.apply(flat[run], tiles, record, direction=self.direction, decays=span.decays)
            self._perturb(flat[run], tiles, [(probe, span.view(probe.into)[run]) for probe in probes])

    def _perturb(self, clean: torch.Tensor, tiles: TileMap, targets: Sequence[tuple[Perturbed, torch.Tensor]]) -> None:
        if not targets:
            return
        z = draw(self.direction, targets[0][0].seed, tiles, device=clean.device)
        step = torch.empty_like(z) if len(targets) > 1 else z
        for probe, target in targets:
            torch.mul(z, probe.coefficient, out=step)
            if clean.dtype == torch.float32:
                torch.add(clean, step, out=target)
            else:
                target.copy_(torch.add(clean, step, out=step))


class _Registry(NamedTuple):
    """What an identity can name: parts by their own identities."""

    directions: tuple[Direction, ...]
    estimators: tuple[Estimator, ...]
    updates: tuple[Update, ...]


METHODS = _Registry(
    directions=(Rademacher(), Gaussian()),
    estimators=(TwoSidedSPSA(),),
    updates=(SGD("nearest"), SGD("stochastic")),
)
ARGUMENTS = {"direction": "`direction`", "estimator": "`zo_eps`, `num_directions`", "update": "`rounding`"}
"""The user's arguments that choose each part."""


def make_method(
    direction: str,
    *,
    rounding: Rounding,
    zo_eps: float = 1e-3,
    num_directions: int = 1,
    tensors: Sequence[tuple[int, int]] = (),
    device_kind: str = "cpu",
) -> Method:
    """Make the method of a user's choices.

    Args:
        direction: "rademacher", "gaussian", or "mezo".
        tensors: (tensor id, elements) of all trainable tensors in order, for "mezo".
        device_kind: see `zo.mezo.device_kind`, for "mezo".

    Raises:
        ConfigError: there is no such direction.
    """
    is_mezo = direction == "mezo"
    found = MezoNoise(tensors, device_kind=device_kind) if is_mezo else make_direction(direction)
    estimator = TwoSidedSPSA(zo_eps=zo_eps, num_directions=num_directions)
    return Method(direction=found, estimator=estimator, update=SGD(rounding))


class UnknownPart(ValueError):
    """An identity names a part that this zo2trl does not have."""


class DrawnOtherwise(UnknownPart):
    """An identity names a direction whose values depend on the kind of device, and this is another kind."""

    def __init__(self, name: str, *, here: str) -> None:
        super().__init__(name)
        self.name, self.here = name, here


def method_of(identity: str, *, tensors: Sequence[tuple[int, int]] = (), device_kind: str = "cpu") -> Method:
    """Make the method that an identity names, to repeat recorded steps; its estimator has default settings.

    Args:
        tensors, device_kind: see `make_method`.

    Raises:
        UnknownPart, DrawnOtherwise: it cannot be made here.
    """
    names = identity.split(_SEPARATOR)
    if len(names) != len(ARGUMENTS):
        raise UnknownPart(identity)
    mezo = MezoNoise(tensors, device_kind=device_kind)
    direction, estimator, update = names
    if direction.startswith(_MEZO) and direction != mezo.identity:
        raise DrawnOtherwise(direction, here=mezo.identity)
    return Method(
        direction=_named(direction, (*METHODS.directions, mezo)),
        estimator=_named(estimator, METHODS.estimators),
        update=_named(update, METHODS.updates),
    )


_Part = TypeVar("_Part", Direction, Estimator, Update)


def _named(identity: str, parts: Iterable[_Part]) -> _Part:
    for part in parts:
        if part.identity == identity:
            return part
    raise UnknownPart(identity)


def differing_part(found: str, wanted: str) -> str | None:
    """The part of two identities that differs, in words and with the argument that chooses it; None if none does."""
    names = [identity.split(_SEPARATOR) for identity in (found, wanted)]
    if len(names[0]) != len(names[1]):
        return f"method is {found[:80]!r}, and would now be {wanted[:80]!r}"
    for (part, argument), before, now in zip(ARGUMENTS.items(), *names, strict=False):
        if before != now:
            return f"{part} is {before!r}, and would now be {now!r} ({argument})"
    return None
