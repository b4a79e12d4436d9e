"""This module saves and restores which adapters of a PEFT model are switched on, separately for every pass.

A loss may switch adapters off to compute reference values with the base model (TRL's `use_adapter`). In lockstep it is
suspended there while other passes run, and these must find their adapters on.

Does not: train, load or save adapters.
Invariant: `set(get())` changes nothing, flags of parameters included.
"""

from typing import Any, NamedTuple

from torch import nn

__all__ = ["AdapterState", "adapter_states"]

_PATCHED = ("forward", "prepare_inputs_for_generation")  # prompt learning, switched off, replaces them


class _Switches(NamedTuple):
    disabled: bool
    active: tuple[str, ...]
    patched: tuple[Any, ...]


class AdapterState:
    """This `PassLocal` of the engine holds which adapters are active, and whether they are on."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get(self) -> _Switches:
        """Return the state of all adapter layers, which PEFT switches together."""
        model = self._model
        patched = tuple(model.__dict__.get(name) for name in _PATCHED)
        return _Switches(model._adapters_disabled, tuple(model.active_adapters), patched)

    def set(self, value: _Switches) -> None:
        """Switch all adapter layers to the state that `get` returned."""
        model, now = self._model, self.get()
        if now.active != value.active:
            model.set_adapter(value.active[0] if len(value.active) == 1 else list(value.active))
        if now.disabled != value.disabled and not model.peft_config[model.active_adapter].is_prompt_learning:
            switch = (
                model.base_model.disable_adapter_layers if value.disabled else model.base_model.enable_adapter_layers
            )
            switch()
        for name, method in zip(_PATCHED, value.patched, strict=True):
            if method is None:
                model.__dict__.pop(name, None)
            else:
                model.__dict__[name] = method
        model._adapters_disabled = value.disabled


def adapter_states(model: nn.Module) -> list[AdapterState]:
    """Return one `AdapterState` for a PEFT model, and none for any other model."""
    return [AdapterState(model)] if hasattr(model, "peft_config") and hasattr(model, "_adapters_disabled") else []
