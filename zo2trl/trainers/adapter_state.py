"""Which adapters of a PEFT model are switched on, kept apart for every pass.

A loss may switch adapters off to ask the base for reference values (TRL's `use_adapter`). In lockstep it is suspended
there while other passes run, which must find their adapters on.

Does not: train, load or save adapters.
Invariant: after `set(get())` nothing has changed, flags of parameters included.
"""

from typing import Any, NamedTuple

from torch import nn

__all__ = ["AdapterState", "adapter_states"]

_PATCHED = ("forward", "prepare_inputs_for_generation")  # on the instance, by prompt learning that is switched off


class _Switches(NamedTuple):
    disabled: bool
    active: tuple[str, ...]
    patched: tuple[Any, ...]


class AdapterState:
    """A `PassLocal` of the engine: on or off, and which adapters are active."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get(self) -> _Switches:
        """The state of all adapter layers, which PEFT switches together."""
        model = self._model
        patched = tuple(model.__dict__.get(name) for name in _PATCHED)
        return _Switches(model._adapters_disabled, tuple(model.active_adapters), patched)

    def set(self, value: _Switches) -> None:
        """Switch all adapter layers to what they were."""
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
    """One for a PEFT model, none for any other."""
    return [AdapterState(model)] if hasattr(model, "peft_config") and hasattr(model, "_adapters_disabled") else []
