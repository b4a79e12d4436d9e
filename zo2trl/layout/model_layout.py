"""Model -> layout: finds the blocks of a model, groups its parameters into units and cuts these into segments.

Does not: read or move weights, or decide where they live.
Invariant: every parameter is in exactly one unit, tied ones once, but for quantised ones, which are in none and stay
where they are; a unit's tensors follow `named_parameters()` order, whatever the granularity.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from zo2trl.amp.codecs import PLAIN
from zo2trl.layout.layout import Kind, Layout, Segment, TensorSpec, Unit, VisitPoint, spans_of, trained_part
from zo2trl.layout.quantised import is_quantised, quantised_bytes

__all__ = ["find_stacks", "plan_layout"]


def find_stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Stacks of blocks in definition order: outermost ModuleLists whose every child is a transformer block.

    A block is a `GradientCheckpointingLayer`, which is what transformers makes of every decoder or encoder layer;
    models without any fall back to the class names in `_no_split_modules`.
    """
    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    stacks = _stacks_where(model, lambda child: isinstance(child, GradientCheckpointingLayer))
    return stacks or _stacks_where(model, lambda child: type(child).__name__ in names)


def _stacks_where(model: nn.Module, is_block: Callable[[nn.Module], bool]) -> list[tuple[str, nn.ModuleList]]:
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and all(map(is_block, module)) and not inside:
            found.append((name, module))
    return found


def plan_layout(
    model: nn.Module,
    *,
    decay_names: Collection[str] = (),
    leaf_blocks: Collection[str] | Literal["all"] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
    order: Sequence[str] = (),
    stored: Mapping[str, str] | None = None,
) -> Layout:
    """Lay a model out in units.

    Args:
        model: any module; blocks are found by `find_stacks`, parameters may live on any device but meta. Quantised
            parameters (quantised.py) are no part of the layout.
        decay_names: parameter names that weight decay applies to.
        leaf_blocks: names of blocks to visit leaf by leaf, or "all".
        dtypes: storage dtypes of parameters that the store must cast while it adopts them.
        order: the names of all parameters in the order they are numbered, if it is not that of `named_parameters()`
            now: a parametrisation that was put on and taken off again (PEFT does so in every forward of an adapter
            on a parameter) leaves its parameter last in its module.
        stored: parameter name -> stored form of frozen parameters that are not stored plain (`TensorSpec`).
    """
    stacks = find_stacks(model)
    blocks = _once((f"{name}.{i}", block) for name, stack in stacks for i, block in enumerate(stack))
    names = {id(block): name for name, block in blocks}
    leafy = frozenset(
        name for name, block in blocks if (leaf_blocks == "all" or name in leaf_blocks) and _leaves_are_disjoint(block)
    )
    specs = _Specs(model, set(decay_names), dtypes or {}, order=order, stored=stored or {})
    owners = Counter(id(p) for _, block in blocks for p in set(block.parameters()) if not is_quantised(p))
    in_blocks = set(owners)
    named = model.named_parameters(remove_duplicate=False)
    outside = {id(p) for name, p in named if not _within(name, blocks)}
    shared = {key for key in in_blocks if owners[key] > 1 or key in outside}

    builder = _Builder(specs)
    root = builder.resident_units("root", "root", [i for i in specs.order if i not in in_blocks])
    common = builder.resident_units("shared", "shared", [i for i in specs.order if i in shared])
    common_segments = [builder.segment(unit, unit.tensors) for unit in common]
    visited: set[int] = set()
    points = [("root", "root", [*(builder.segment(unit, unit.tensors) for unit in root), *common_segments])]
    for name, block in blocks:
        own = [i for i in specs.order_of(block) if i not in shared]
        units = builder.block_units(name, own, n_quantised_bytes=specs.n_quantised_bytes(block))
        for module_name, module in _once(_leaves(name, block) if name in leafy else [(name, block)], seen=visited):
            held = {id(p) for p in module.parameters()}
            segments = [builder.segment(unit, _held(specs, unit, held)) for unit in units]
            if held & shared:
                segments += common_segments
            points.append((module_name, name, [segment for segment in segments if segment]))
    return Layout(
        units=tuple(builder.units),
        points=tuple(
            VisitPoint(index=i, module_name=module, block_name=block, segments=tuple(filter(None, segments)))
            for i, (module, block, segments) in enumerate(points)
        ),
        stack_ends=frozenset(names[id(stack[len(stack) - 1])] for _, stack in stacks),
        leaf_blocks=leafy,
    )


def _once(named: Iterable[tuple[str, nn.Module]], *, seen: set[int] | None = None) -> list[tuple[str, nn.Module]]:
    """Modules that were not seen before, under their first names: one used at two places has one hook."""
    seen = set() if seen is None else seen
    return [(name, module) for name, module in named if not (id(module) in seen or seen.add(id(module)))]


def _within(parameter_name: str, blocks: Sequence[tuple[str, nn.Module]]) -> bool:
    return any(parameter_name.startswith(f"{name}.") for name, _ in blocks)


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost modules that own parameters, each with its whole subtree."""
    if any(True for _ in module.parameters(recurse=False)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _leaves(f"{name}.{child_name}", child)


def _leaves_are_disjoint(block: nn.Module) -> bool:
    """False when two leaves share a weight: alone, each of them would move it."""
    held = [id(p) for _, leaf in _leaves("", block) for p in leaf.parameters()]
    return len(held) == len(set(held))


class _Specs:
    """A model's parameters, tied ones once, keyed by the identity of the Parameter; `behind` fills in offsets."""

    _of: dict[int, TensorSpec]

    def __init__(
        self,
        model: nn.Module,
        decay: set[str],
        dtypes: Mapping[str, torch.dtype],
        *,
        order: Sequence[str],
        stored: Mapping[str, str],
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if not is_quantised(p)}
        self._of = {
            id(p): TensorSpec(
                name=name, tensor_id=tensor_id, shape=tuple(p.shape), dtype=dtypes.get(name, p.dtype), byte_offset=0,
                trainable=p.requires_grad, decays=name in decay, stored_offset=0,
                stored=stored.get(name, PLAIN.identity),
            )
            for tensor_id, (name, p) in enumerate((name, named[name]) for name in order or named if name in named)
        }  # fmt: skip
        self.order = list(self._of)
        self._keys = {spec.name: key for key, spec in self._of.items()}

    def order_of(self, module: nn.Module) -> list[int]:
        held = {id(p) for p in module.parameters()}
        return [key for key in self.order if key in held]

    def key(self, spec: TensorSpec) -> int:
        return self._keys[spec.name]

    def is_trainable(self, key: int) -> bool:
        return self._of[key].trainable

    def n_bytes(self, key: int) -> int:
        return self._of[key].n_bytes

    def n_quantised_bytes(self, module: nn.Module) -> int:
        return sum(quantised_bytes(p) for p in set(module.parameters()) if is_quantised(p))

    def behind(self, before: TensorSpec | None, key: int) -> TensorSpec:
        """A parameter, placed behind another one of its unit."""
        if before is None:
            return self._of[key]
        byte_offset = before.byte_offset + before.n_padded_bytes
        stored_offset = before.stored_offset + before.stored_padded_bytes
        return replace(self._of[key], byte_offset=byte_offset, stored_offset=stored_offset)


def _held(specs: _Specs, unit: Unit, held: set[int]) -> tuple[TensorSpec, ...]:
    return tuple(tensor for tensor in unit.tensors if specs.key(tensor) in held)


class _Builder:
    """Numbers units and segments as they are made."""

    def __init__(self, specs: _Specs) -> None:
        self._specs = specs
        self.units: list[Unit] = []
        self._n_segments = 0

    def unit(self, name: str, kind: Kind, keys: Sequence[int]) -> Unit | None:
        if not keys:
            return None
        tensors: list[TensorSpec] = []
        for key in keys:
            tensors.append(self._specs.behind(tensors[-1] if tensors else None, key))
        self.units.append(Unit(index=len(self.units), name=name, kind=kind, tensors=tuple(tensors)))
        return self.units[-1]

    def resident_units(self, name: str, kind: Kind, keys: Sequence[int]) -> list[Unit]:
        """One unit; two where some are trained and some are frozen, so that what is frozen is never copied."""
        trainable, frozen = self._parted(keys)
        named = trained_part(name) if frozen else name
        return [unit for unit in (self.unit(name, kind, frozen), self.unit(named, kind, trainable)) if unit]

    def block_units(self, name: str, keys: Sequence[int], *, n_quantised_bytes: int) -> list[Unit]:
        """The same for a block, whose trainable part stays on the device if it is the smaller one."""
        trainable, frozen = self._parted(keys)
        n_frozen_bytes = n_quantised_bytes + sum(map(self._specs.n_bytes, frozen))
        is_small = sum(map(self._specs.n_bytes, trainable)) < n_frozen_bytes
        named = trained_part(name) if frozen else name
        kind: Kind = "adapter" if is_small else "block"
        return [unit for unit in (self.unit(name, "block", frozen), self.unit(named, kind, trainable)) if unit]

    def _parted(self, keys: Sequence[int]) -> tuple[list[int], list[int]]:
        trainable = [key for key in keys if self._specs.is_trainable(key)]
        return trainable, [key for key in keys if not self._specs.is_trainable(key)]

    def segment(self, unit: Unit, tensors: Sequence[TensorSpec]) -> Segment | None:
        if not tensors:
            return None
        start = tensors[0].byte_offset
        stop = tensors[-1].byte_offset + tensors[-1].n_padded_bytes
        self._n_segments += 1
        return Segment(
            index=self._n_segments - 1, unit=unit, byte_start=start, n_bytes=stop - start, tensors=tuple(tensors),
            spans=tuple(spans_of(tensors, start)),
        )  # fmt: skip
