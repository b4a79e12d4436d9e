"""Binding: which module needs which segments, and what a Parameter's `data` points to at every moment.

Does not: fetch, perturb or decide anything.

Three states of a parameter: at rest (a view of its home, so that `state_dict`, savers and users just work), poisoned
(NaN everywhere, during a traversal, while it must not be read), and bound (leased or perturbed bytes). Only
`Parameter.data` is swapped: the Parameter objects stay, and with them ties, optimizer groups and PEFT's references.

Invariant: outside a traversal every parameter is at rest.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from operator import attrgetter
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from zo2trl.errors import TraversalError
from zo2trl.layout.layout import Layout, Segment, TensorSpec, Unit, VisitPoint
from zo2trl.tiers.store import TieredStore
from zo2trl.tiers.tier import carve

__all__ = ["Around", "Binding", "FirstUse", "Forward"]

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]
Arguments = tuple[tuple, dict]
Around = Callable[[VisitPoint, Forward, Arguments], Any]
"""Gets a visit point, the module's own forward and its (args, kwargs); returns what the forward returns."""


_USES = ("generate", "save_pretrained", "merge_and_unload", "merge_adapter", "unload", "__reduce_ex__")
"""What reads or keeps a model's weights or their dtype before any forward or state dict is asked for."""


_LOOKS = (torch.Tensor.data_ptr, attrgetter("_version"), attrgetter("dtype"))


class _Misfit(NamedTuple):
    name: str
    parameter: nn.Parameter
    replacement: torch.Tensor


class Binding:
    """Swaps parameter storage of one model, and calls back when a forward enters or leaves a visit point."""

    _parameters: dict[int, nn.Parameter]  # tensor id -> Parameter
    _bound_views: dict[tuple[int, int, int], list[tuple[nn.Parameter, torch.Tensor]]]  # (segment, addresses) -> its
    _views_at_home: dict[int, tuple[int, list[tuple[nn.Parameter, torch.Tensor]]]]  # unit -> (version, its tensors)
    _bound_home: dict[int, torch.Tensor]  # tensor id -> the view it was last bound home with
    _seen_versions: dict[int, int]  # tensor id -> Parameter._version at that moment
    _untouched: list[list[Any]]  # `_state` at that moment

    def __init__(self, model: nn.Module, layout: Layout, store: TieredStore) -> None:
        self.layout = layout
        self._model = model
        self._store = store
        named = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = {t.tensor_id: named[t.name] for unit in layout.units for t in unit.tensors}
        self._bound_views = {}
        self._views_at_home = {}
        self._bound_home = {}
        self._seen_versions = {}
        self._untouched = []
        self._buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        self._hooked: list[tuple[nn.Module, Forward | None]] = []
        self._handles: list[RemovableHandle] = []

    # -- states of the parameters

    def bind(
        self, point: VisitPoint, weights: Sequence[torch.Tensor], *, perturbed: Sequence[torch.Tensor | None] = ()
    ) -> None:
        """Point a visit's parameters at clean bytes, and its trainable ones at perturbed bytes where given."""
        for i, segment in enumerate(point.segments):
            for parameter, view in self._views(segment, weights[i], perturbed[i] if perturbed else None):
                parameter.data = view

    def poison(self, point: VisitPoint) -> None:
        """Make a point's parameters unreadable: a hook that was missed shows as NaN, not as stale weights."""
        for segment in point.segments:
            for spec in segment.tensors:
                self._parameters[spec.tensor_id].data = self._poisons[spec.tensor_id]

    def poison_all(self) -> None:
        """Start of a traversal."""
        for point in self.layout.points:
            self.poison(point)

    def bind_home(self) -> None:
        """End of a traversal: every parameter shows its home."""
        for unit in self.layout.units:
            for spec, (parameter, view) in zip(unit.tensors, self._home_views(unit.index), strict=True):
                parameter.data = self._bound_home[spec.tensor_id] = view
        self.note_versions()

    def let_go(self) -> None:
        """Leave every parameter poisoned and hold no home: units may move, and this binding is of no more use."""
        self.poison_all()
        self._bound_views.clear()
        self._views_at_home.clear()
        self._bound_home.clear()

    def bind_home_of(self, point: VisitPoint) -> None:
        """End of a visit outside any traversal. What the forward did to versions (a parametrisation that is put on
        and taken off again counts as a change) is no change of weights."""
        for segment in point.segments:
            held = {spec.tensor_id for spec in segment.tensors}
            views = zip(segment.unit.tensors, self._home_views(segment.unit.index), strict=True)
            for spec, (parameter, view) in views:
                if spec.tensor_id in held:
                    parameter.data = self._bound_home[spec.tensor_id] = view
                    self._seen_versions[spec.tensor_id] = parameter._version

    def note_versions(self) -> None:
        """Take the parameters' values for known."""
        self._seen_versions = {key: p._version for key, p in self._parameters.items()}
        self._untouched = self._state()

    def collect_changes(self, point: VisitPoint | None = None) -> list[Unit]:
        """Take over writes into parameters bound home, at one point or all, and return the units written to.

        In-place changes (`load_state_dict`, `p.add_`) are at home already, for they were made there. New tensors
        (`p.data = ...`) are copied home.

        Raises:
            TraversalError: the dtype or shape changed, or steps were pending that the changed weights never saw.
        """
        if point is None and self._untouched and self._untouched == self._state():
            return []
        points = self.layout.points if point is None else (point,)
        changed: dict[int, Unit] = {}
        for segment in {id(s): s for p in points for s in p.segments}.values():
            for spec in segment.tensors:
                parameter, bound_home = self._parameters[spec.tensor_id], self._bound_home[spec.tensor_id]
                is_new = parameter.data_ptr() != bound_home.data_ptr() or parameter.dtype != bound_home.dtype
                if is_new or parameter._version != self._seen_versions[spec.tensor_id]:
                    self._refuse_if_behind(spec, segment.unit)
                    changed[segment.unit.index] = segment.unit
                if is_new:
                    self._bring_home(spec, parameter, segment.unit)
        return list(changed.values())

    def set_misfits_aside(self) -> Callable[[], None]:
        """Put parameters to rest that hold what `collect_changes` would refuse for its dtype or shape.

        Returns:
            To be called in the end. Another shape is given back then, for the rest of the model has it by now. Another
            dtype is not: it was made of weights that may have been steps behind.
        """
        found: list[_Misfit] = []
        for unit in self.layout.units:
            for spec in unit.tensors:
                parameter, bound_home = self._parameters[spec.tensor_id], self._bound_home.get(spec.tensor_id)
                if bound_home is not None and (parameter.dtype, parameter.shape) != (
                    bound_home.dtype,
                    bound_home.shape,
                ):
                    found.append(_Misfit(spec.name, parameter, parameter.data))
                    parameter.data = bound_home
        for module, name, buffer in self._buffers if found else ():  # a conversion rounds these, too
            now = module._buffers.get(name)
            if now is not None and now.dtype != buffer.dtype:
                module._buffers[name] = buffer
        return partial(_settle, found)

    def _state(self) -> list[list[Any]]:
        """Addresses, versions and dtypes. Without a loop of Python's: a device waits while a step begins."""
        every = self._parameters.values()
        return [list(map(look, every)) for look in _LOOKS]

    def _bring_home(self, spec: TensorSpec, parameter: nn.Parameter, unit: Unit) -> None:
        home = self._home_views(unit.index)[unit.tensors.index(spec)][1]
        if parameter.shape != home.shape or parameter.dtype != home.dtype:
            raise TraversalError(
                f"{spec.name} was replaced by a {parameter.dtype} tensor of shape {tuple(parameter.shape)}; the "
                f"store holds {home.dtype} of shape {tuple(home.shape)}. To convert a trained model, call "
                "`trainer.close()` first: it is an ordinary model from then on."
            )
        home.copy_(parameter.data)
        parameter.data = self._bound_home[spec.tensor_id] = home

    def _refuse_if_behind(self, spec: TensorSpec, unit: Unit) -> None:
        if self._store.is_behind(unit):
            self._seen_versions[spec.tensor_id] = self._parameters[spec.tensor_id]._version  # said once
            raise TraversalError(
                f"{spec.name} was changed in place while steps were pending that it had not absorbed: they would be "
                "added to the new values. Call `trainer.engine.flush()` before changing weights between steps."
            )

    # -- hooks

    def hook(self, around: Around, *, after_stack: Callable[[], None], before_state: Callable[[], None]) -> None:
        """Route the forward of every visited module through `around`.

        The hook is an instance attribute `forward`: it goes round transformers' checkpointing wrapper and leaves
        forward (pre-)hooks that others registered where they were. `after_stack` is called behind each stack,
        `before_state` before `state_dict` and `load_state_dict` of the model or of a transformers model in it.
        """
        for module in self._model.modules():
            if module is self._model or isinstance(module, PreTrainedModel):
                hook = _BeforeState(before_state)
                self._handles.append(module.register_state_dict_pre_hook(hook))
                self._handles.append(module.register_load_state_dict_pre_hook(hook))
        for point in self.layout.points[1:]:
            self._wrap(self._model.get_submodule(point.module_name), partial(around, point))
        for name in self.layout.stack_ends:
            self._wrap(self._model.get_submodule(name), _followed_by(after_stack))

    def unhook(self) -> None:
        """Give the modules their own forward back, and let go of ring and scratch memory; idempotent."""
        self._bound_views.clear()
        while self._handles:
            self._handles.pop().remove()
        while self._hooked:
            module, before = self._hooked.pop()
            if before is None:
                del module.forward
            else:
                module.forward = before

    def _wrap(self, module: nn.Module, around: Callable[[Forward, Arguments], Any]) -> None:
        before = module.__dict__.get("forward")
        module.forward = _Routed(module.forward, around)
        self._hooked.append((module, before))

    # -- views

    def _views(
        self, segment: Segment, clean: torch.Tensor, moved: torch.Tensor | None
    ) -> list[tuple[nn.Parameter, torch.Tensor]]:
        key = (segment.index, clean.data_ptr(), 0 if moved is None else moved.data_ptr())
        views = self._bound_views.get(key)
        if views is None:
            views = self._bound_views[key] = [
                (self._parameters[s.tensor_id], carve(buffer, s, byte_start=segment.byte_start))
                for s in segment.tensors
                for buffer in [moved if moved is not None and s.trainable else clean]
            ]
        return views

    def _home_views(self, unit_index: int) -> list[tuple[nn.Parameter, torch.Tensor]]:
        unit, known = self.layout.units[unit_index], self._views_at_home.get(unit_index)
        found = self._store.tensors(unit, unless_version=known and known[0])
        if found is None:
            assert known is not None
            return known[1]
        parameters = (self._parameters[spec.tensor_id] for spec in unit.tensors)
        views = list(zip(parameters, found[0], strict=True))
        self._views_at_home[unit_index] = (found[1], views)
        return views

    @cached_property
    def _poisons(self) -> dict[int, torch.Tensor]:
        """NaN for every tensor, by its id: views of one number a dtype."""
        specs = [spec for unit in self.layout.units for spec in unit.tensors]
        nans: dict[torch.dtype, torch.Tensor] = {}
        for dtype in {spec.dtype for spec in specs}:
            fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
            nans[dtype] = torch.full((), fill, dtype=dtype, device=self._store.device)
        return {spec.tensor_id: nans[spec.dtype].expand(spec.shape) for spec in specs}


def _followed_by(after: Callable[[], None]) -> Callable[[Forward, Arguments], Any]:
    def around(inner: Forward, arguments: Arguments) -> Any:
        output = inner(*arguments[0], **arguments[1])
        after()
        return output

    return around


def _settle(misfits: Sequence[_Misfit]) -> None:
    resized = [one for one in misfits if one.replacement.shape != one.parameter.shape]
    cast = [one for one in misfits if one.replacement.shape == one.parameter.shape]
    for one in resized:
        one.parameter.data = one.replacement.to(one.parameter.dtype)
    if resized:
        names = ", ".join(one.name for one in resized)
        logger.warning(
            "Closing leaves %s as resized: the store, which holds another shape, could not adopt it.", names
        )
    if cast:
        logger.warning(
            "Closing undoes a conversion that the store could not adopt: %s and %d more parameters show their trained "
            "values in %s again. Convert the model now that it is closed.",
            cast[0].name, len(cast) - 1, cast[0].parameter.dtype,
        )  # fmt: skip


class _Routed:
    """A module's forward while its weights are managed; a copy or a pickle of the module gets the plain one back."""

    def __init__(self, inner: Forward, around: Callable[[Forward, Arguments], Any]) -> None:
        self._inner, self._around = inner, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._inner, (args, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return copy.deepcopy(self._inner, memo)

    def __reduce__(self) -> Any:
        if isinstance(self._inner, MethodType):
            return getattr, (self._inner.__self__, self._inner.__name__)
        return self._inner.__reduce__()


class FirstUse:
    """Calls back, once, before a model is used whose parameters are not yet what they are going to be.

    A use is a forward, a state dict, a copy, a pickle, or one of `_USES`. The hooks are gone before the call, and come
    back if it fails.
    """

    def __init__(self, model: nn.Module, call: Callable[[], None]) -> None:
        self._model, self._call = model, call
        self._handles: list[RemovableHandle] = []
        self._routed: list[tuple[nn.Module, str, Any, Any]] = []
        self._install()

    def come(self) -> None:
        """It is being used, or is about to be; idempotent."""
        if self._handles:
            with self.preparing():
                self._call()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Inside, and afterwards unless it raises, there are no hooks."""
        was_there = bool(self._handles)
        self._remove()
        try:
            yield
        except BaseException:
            if was_there:
                self._install()
            raise

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        while self._routed:
            module, name, routed, before = self._routed.pop()
            if module.__dict__.get(name) is not routed:
                continue  # other code wrapped it again: it stays, and does nothing of its own any more
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

    def _install(self) -> None:
        hook = _BeforeState(self.come)
        for module in self._model.modules():
            if module is self._model or isinstance(module, PreTrainedModel):
                self._handles.append(module.register_forward_pre_hook(hook))
                self._handles.append(module.register_state_dict_pre_hook(hook))
                self._handles.append(module.register_load_state_dict_pre_hook(hook))
                self._route(module, _USES)
            else:
                self._route(module, _USES[:-1])  # the tuners of PEFT

    def _route(self, module: nn.Module, names: Sequence[str]) -> None:
        for name in names:
            if hasattr(type(module), name):
                before = module.__dict__.get(name)
                routed = _Routed(getattr(module, name), self._before)
                module.__dict__[name] = routed
                self._routed.append((module, name, routed, before))

    def _before(self, inner: Forward, arguments: Arguments) -> Any:
        self.come()
        return inner(*arguments[0], **arguments[1])


class _BeforeState:
    """Calls back before a module does something; in a copy or a pickle of the module it does nothing."""

    def __init__(self, call: Callable[[], None] | None = None) -> None:
        self._call = call

    def __call__(self, *_: Any) -> None:
        if self._call is not None:
            self._call()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_BeforeState":
        return _BeforeState()

    def __reduce__(self) -> Any:
        return _BeforeState, ()
