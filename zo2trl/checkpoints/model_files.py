"""This module writes and reads the folder `model/` of a store: all that an exported folder holds besides weights.

The store writes it while it has the model; an export reads it without. Does not: hold trained weights, or run code
that came with a checkpoint: classes that are not transformers' own are exported by the names of their parameters.

::

    model/
    ├── model_class.json       the class, the renamings of its checkpoint's names, and the names in an adapter's file
    ├── config.json            the configuration, if the model is transformers'
    ├── generation_config.json the generation defaults, if it can generate
    ├── adapter_config.json    the adapter, if it is a PEFT model; further adapters are in folders of their names
    ├── buffers.safetensors    saved tensors that are not trained: persistent buffers, and others in an adapter's file
    │                          (resized embeddings)
    └── ...                    files that the trainer adds (tokenizer files) and an export copies as they are

Invariant: reading needs no network, and imports nothing but transformers.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from zo2trl.checkpoints.load import build_skeleton
from zo2trl.errors import StoreCorrupt
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.paths import inside
from zo2trl.files.strict_json import JSON, Fields, read_json, write_json
from zo2trl.layout.layout import TensorSpec

__all__ = ["ModelFiles", "describe_model", "is_saved_as_adapter"]

MODEL_FORMAT = 1
MAX_BYTES = 64 * 2**20  # the limit of a JSON file; adapters list their tensors' names
_CLASS, _BUFFERS, _ADAPTER = "model_class.json", "buffers.safetensors", "adapter_config.json"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_OURS = (_CLASS, _BUFFERS)

# This maps the folder of an adapter's file to a table from name in the file to name in the model's state dict; None if
# its tensors are computed while they are saved.
_Adapters = dict[str, dict[str, str] | None]


def is_saved_as_adapter(model: nn.Module) -> bool:
    """Return whether saving the model writes its adapters only, and not the base."""
    return hasattr(model, "peft_config")


def describe_model(model: nn.Module, folder: Path, *, fs: FS = LOCAL) -> None:
    """Write into `folder` all that an export needs of a model besides the values of its parameters."""
    state: dict[str, Any] = {n: v for n, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
    adapters, configs = _adapters_of(model, state)
    for name, config in configs.items():
        fs.make_dir(folder / name)
        fs.write_text_atomically(folder / name / _ADAPTER, config)
    trained = {name for name, value in state.items() if isinstance(value, nn.Parameter) and value.requires_grad}
    constants = {name for name, value in state.items() if not isinstance(value, nn.Parameter)}
    if adapters is not None:
        constants = {name for names in adapters.values() for name in (names or {}).values()} - trained
    elif isinstance(model, PreTrainedModel):
        fs.write_text_atomically(folder / _CONFIG, model.config.to_json_string())
        if model.can_generate() and model.generation_config is not None:
            fs.write_text_atomically(folder / _GENERATION, model.generation_config.to_json_string())
    if constants:
        copies = {name: state[name].detach().cpu().clone().contiguous() for name in sorted(constants)}
        fs.write_atomically(folder / _BUFFERS, safetensors.torch.save(copies, metadata={"format": "pt"}))
    described: dict[str, Any] = {
        "format": MODEL_FORMAT,
        "class": type(model).__name__,
        "module": type(model).__module__,
        "conversions": _conversions_of(model),
        "adapters": adapters,
    }
    write_json(folder / _CLASS, described, fs=fs)


@dataclass(frozen=True, eq=False)
class ModelFiles:
    """A ModelFiles is the content of a `model/` folder; `read` makes one.

    Attributes:
        folder: the folder.
        class_name: the name of the model's class.
        module: the module that defined the class.
        adapters: a table from folder of an adapter in the output to name in its file to name in the model (None:
            computed); None for a model that is saved as a whole.
    """

    folder: Path
    class_name: str
    module: str
    adapters: _Adapters | None
    _conversions: list[JSON] | None
    _fs: FS

    @classmethod
    def read(cls, folder: Path, *, fs: FS = LOCAL) -> "ModelFiles":
        """Read a `model/` folder; raise `StoreCorrupt` naming file and field if its description is not valid."""
        path = inside(folder, _CLASS, error=StoreCorrupt)
        fields = Fields(read_json(path, max_bytes=MAX_BYTES, fs=fs), str(path))
        if (version := fields.integer("format")) != MODEL_FORMAT:
            raise StoreCorrupt(
                f"{path} has format {version}; this zo2trl reads format {MODEL_FORMAT}. Use the zo2trl that wrote it."
            )
        for name in ("adapters", "conversions"):  # null has a meaning, absence has none
            if name not in fields.values:
                raise fields.refuse(name, "it is missing")
        is_whole, is_new = (fields.values[name] is None for name in ("adapters", "conversions"))
        return cls(
            folder=folder, class_name=fields.text("class"), module=fields.text("module"),
            adapters=None if is_whole else _read_adapters(fields.table("adapters"), folder),
            _conversions=None if is_new else fields.list("conversions"), _fs=fs,
        )  # fmt: skip

    def buffers(self) -> dict[str, torch.Tensor]:
        """Read the tensors to save that are not trained parameters."""
        path = inside(self.folder, _BUFFERS, error=StoreCorrupt)
        if not self._fs.exists(path):
            return {}
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise StoreCorrupt(
                f"{path} is not a whole safetensors file ({error}). Restore it from a copy, or save the weights with "
                "the trainer's own `save_model`."
            ) from error

    def skeleton(self, tensors: Iterable[TensorSpec]) -> PreTrainedModel | None:
        """Build a model without storage whose own `save_pretrained` saves these parameters after `fill`.

        It returns None if this transformers lacks the class, or has it with other parameters.
        """
        model_class = self.transformers_class()
        if model_class is None or not self._fs.exists(self.folder / _CONFIG):
            return None
        wanted = [(spec.name, spec.shape) for spec in sorted(tensors, key=lambda spec: spec.tensor_id)]
        model: Any = self._build(model_class, most_layers=len(wanted))
        if model is None:
            return None
        found = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        state = model.state_dict(keep_vars=True)
        buffers = {name for name, value in state.items() if not isinstance(value, nn.Parameter)}
        if found != wanted or buffers != set(self.buffers()):
            return None
        if self._conversions is not None:
            known = {_key(_signature(entry)): entry for entry in get_model_conversion_mapping(model)}
            model._weight_conversions = [known[_key(row)] for row in self._conversions if _key(row) in known]
        return model

    def transformers_class(self) -> type[PreTrainedModel] | None:
        """Return the model's class if it is transformers' own."""
        found = getattr(transformers, self.class_name, None) if self.module.startswith("transformers.") else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.__module__ == self.module:
            return found
        return None

    def others(self) -> list[str]:
        """Return the names of files to copy as they are, among them adapters' and models' configurations."""
        names = [name for name in self._fs.list_names(self.folder) if name not in _OURS]
        return [name for name in names if inside(self.folder, name, error=StoreCorrupt).is_file()]

    def _build(self, model_class: type[PreTrainedModel], *, most_layers: int) -> PreTrainedModel | None:
        """Build the model on the meta device; return None if it would have more layers than the store has tensors."""
        path = inside(self.folder, _CONFIG, error=StoreCorrupt)
        content = read_json(path, max_bytes=MAX_BYTES, fs=self._fs)
        if _count_layers(content) > most_layers:  # a billion empty modules would take for ever to build
            return None
        try:
            config_class: Any = model_class.config_class
            config = config_class.from_dict(config_class._decode_special_floats(content))
            if config.model_type != config_class.model_type:  # saving looks the model up by this name
                raise ValueError(f"`model_type` is {config.model_type!r} instead of {config_class.model_type!r}")
            config._attn_implementation = "eager"  # others may be looked up on the hub, and nothing is computed here
            model = build_skeleton(model_class, config)
            generation = inside(self.folder, _GENERATION, error=StoreCorrupt)
            if self._fs.exists(generation):
                given: Any = read_json(generation, max_bytes=MAX_BYTES, fs=self._fs)
                model.generation_config = GenerationConfig.from_dict(given)
        except StoreCorrupt:
            raise
        except Exception as error:  # a configuration's own checks may raise anything
            why = f"{type(error).__name__}: {str(error)[:500]}"
            raise StoreCorrupt(
                f"{path} does not configure a {self.class_name} ({why}). Restore it from a copy."
            ) from error
        return model


def fill(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set a skeleton's parameters and persistent buffers by the names of its state dict; ties stay."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                value = values[f"{prefix}.{name}" if prefix else name]
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = values[f"{prefix}.{name}" if prefix else name]


# -- the description of a model


def _adapters_of(model: nn.Module, state: Mapping[str, torch.Tensor]) -> tuple[_Adapters | None, dict[str, str]]:
    """Return the names in each adapter's file, and its configuration, by the folder that PEFT would save it to."""
    if not is_saved_as_adapter(model):
        return None, {}
    from peft import PeftModel, get_peft_model_state_dict

    found: Any = model
    if isinstance(found, PeftModel):
        names = {"" if name == "default" else name: name for name in found.peft_config}
        with warnings.catch_warnings(action="ignore"):  # PEFT repeats them whenever a checkpoint is saved
            saved = {
                folder: get_peft_model_state_dict(found, state_dict=dict(state), adapter_name=name)
                for folder, name in names.items()
            }
        configs = {folder: _as_saved(found, name) for folder, name in names.items()}
    elif getattr(found, "_hf_peft_config_loaded", False):  # transformers added one adapter by itself
        name = found.active_adapters()[0]
        bare = found.get_adapter_state_dict(adapter_name=name, state_dict=dict(state))
        saved = {"": {f"base_model.model.{key}": value for key, value in bare.items()}}
        configs = {"": _config_text(found.peft_config[name], None)}
    else:
        return None, {}
    return {folder: _names_in_model(tensors, state) for folder, tensors in saved.items()}, configs


def _names_in_model(saved: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> dict[str, str] | None:
    """Map each saved tensor to its name in the model: by storage, or (prompts) as the only one that equals it."""
    names = {_place(value): name for name, value in reversed(list(state.items()))}
    names_in_model: dict[str, str] = {}
    for name, tensor in saved.items():
        found = names.get(_place(tensor))
        if found is None:
            alike = (key for key, value in state.items() if (value.shape, value.dtype) == (tensor.shape, tensor.dtype))
            equal = [key for key in alike if torch.equal(state[key], tensor.to(state[key].device))]
            if len(equal) != 1:
                return None
            found = equal[0]
        names_in_model[name] = found
    return names_in_model


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size, torch.dtype]:
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def _as_saved(model: Any, adapter: str) -> str:
    """Return the configuration as `PeftModel.save_pretrained` writes it."""
    config = copy.copy(model.peft_config[adapter])
    base = model.base_model if config.is_prompt_learning else model.base_model.model
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path", None) or None
    config.inference_mode = True
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return _config_text(config, mapping)


def _config_text(config: Any, auto_mapping: dict[str, str] | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder, auto_mapping_dict=auto_mapping)
        return (Path(folder) / _ADAPTER).read_text()


def _read_adapters(table: Mapping[str, JSON], folder: Path) -> _Adapters:
    adapters: _Adapters = {}
    for place, names in table.items():
        if place:
            inside(folder, place, error=StoreCorrupt)
        if names is not None and not (isinstance(names, dict) and all(isinstance(n, str) for n in names.values())):
            raise StoreCorrupt(f"{folder / _CLASS}: the adapter {place!r} is not a table of names. Restore the file.")
        adapters[place] = names  # type: ignore[assignment]
    return adapters


def _count_layers(content: JSON) -> int:
    """Return the largest number of layers in a configuration and those nested in it."""
    if not isinstance(content, dict):
        return 0
    named = (value for key, value in content.items() if "layer" in key and isinstance(value, int))
    return max([0, *named, *map(_count_layers, content.values())])


# -- the renamings between a checkpoint and its model


def _conversions_of(model: nn.Module) -> list[dict[str, Any]] | None:
    """Return signatures of the conversions that transformers undoes when it saves; None if it decides them then."""
    found = getattr(model, "_weight_conversions", None)
    return None if found is None else [_signature(entry) for entry in found]


def _signature(entry: Any) -> dict[str, Any]:
    return {
        "type": type(entry).__name__,
        "from": list(entry._original_source_patterns),
        "to": list(entry._original_target_patterns),
        "scope": entry.scope_prefix,
    }


def _key(row: JSON) -> str:
    return json.dumps(row, sort_keys=True)
