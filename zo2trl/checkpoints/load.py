"""This module loads a checkpoint as a model on the CPU that maps its safetensors files, so that it needs no memory.

Does not: cast (the store does, tensor by tensor, when it first writes its files), place anything on a device, run
pickles, train.
Invariant: after the casts that `MappedModel` names, the model equals ``from_pretrained`` bit for bit; at most the
tensors outside the blocks have memory of their own, and while loading one block tensor at a time.

There are two routes. Usually transformers maps the files by itself. It does not where a tensor is converted: to
another dtype, or from experts that the files keep one by one and the model fuses. Then the blocks are declared
offloaded to disk: transformers converts one tensor at a time and writes fused experts to files, and this module maps
the files that its index names.
"""

import copy
import difflib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file

from zo2trl.checkpoints.weight_files import (
    checkpoint_folder,
    hub_arguments,
    read_headers,
    refuse_misfits,
    weight_files,
)
from zo2trl.errors import CheckpointError, ConfigError, UnsupportedError, ZO2TRLError
from zo2trl.files.fs import LOCAL
from zo2trl.files.sizes import format_bytes
from zo2trl.layout.model_layout import find_stacks

__all__ = ["MappedModel", "load_mapped"]

MAX_EMPTY_LAYERS = 1000
_DTYPE_NAMES = ("bfloat16", "float16", "float32", "float64")
_STORE_PLACES = "the parameter store decides where parameters live"
_OLD_NAME = "pass `quantization_config=BitsAndBytesConfig(...)` with it instead"
_PLACING = ("max_memory", "tp_plan", "tp_size", "device_mesh", "distributed_config", "offload_buffers")
_REFUSED = {
    **dict.fromkeys(_PLACING, _STORE_PLACES),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), _OLD_NAME),
    "disable_mmap": "weights are mapped, never read into memory as a whole",
    "gguf_file": "GGUF weights are quantised; load the original safetensors checkpoint",
    "state_dict": "weights come from the checkpoint's files",
    "output_loading_info": "the caller gets a model only",
}


@dataclass(frozen=True, eq=False)
class MappedModel:
    """A MappedModel is a loaded model with the casts that its store must still make.

    Attributes:
        model: the model on the CPU, in eval mode; most parameters are copy-on-write maps of checkpoint files.
        dtype: the dtype that the store must cast floating parameters to; None if no cast is needed.
        kept_float32: parameters that are float32 whatever `dtype` is (transformers' `keep_in_fp32` modules).
        is_drawn: whether some parameters are not in the checkpoint and were drawn at random (a new head).
    """

    model: PreTrainedModel
    dtype: torch.dtype | None
    kept_float32: frozenset[str] = frozenset()
    is_drawn: bool = False

    def casts(self) -> dict[str, torch.dtype]:
        """Map parameter names to storage dtypes, for the parameters whose dtype still has to change."""
        dtype = self.dtype
        return {
            name: wanted
            for name, parameter in self.model.named_parameters()
            if dtype is not None and parameter.is_floating_point()
            if parameter.dtype != (wanted := torch.float32 if name in self.kept_float32 else dtype)
        }


def load_mapped(
    path_or_id: str | Path,
    *,
    model_class: Any = None,
    offload_folder: Path | None = None,
    quantised_on: torch.device | None = None,
    **model_init_kwargs: Any,
) -> MappedModel:
    """Load a checkpoint as ``from_pretrained`` would, without holding its weights in memory.

    Args:
        path_or_id: a folder with safetensors weights, or a hub id.
        model_class: a model or `Auto...` class; None takes the one that the configuration names.
        offload_folder: a folder on a disk with room for all fused experts. Files written there have lost their names
            when this returns; their bytes are freed with the last parameter that maps them.
        quantised_on: the device that transformers loads a quantised model to, where it stays in memory. None refuses
            quantised models.
        model_init_kwargs: the arguments of `from_pretrained`. `dtype` (or `torch_dtype`) is "auto" unless given.

    Raises:
        CheckpointError: all weights are pickled, files are damaged, or names lead out of the folder.
        UnsupportedError: an argument asks for placement, or the checkpoint is an adapter or quantised.
    """
    kwargs = dict(model_init_kwargs)
    requested = _take_dtype(kwargs)
    _refuse(kwargs)
    source = str(path_or_id)
    _refuse_adapter(source, kwargs)
    config = read_config(source, kwargs)
    files = weight_files(source, config, kwargs)
    if getattr(config, "quantization_config", None) is not None or kwargs.get("quantization_config") is not None:
        kwargs |= {"dtype": requested or "auto", "use_safetensors": True}
        return _load_quantised(model_class or class_named_by(config), source, device=quantised_on, kwargs=kwargs)
    stored = read_headers(files)
    floats = (tensor.dtype for tensor in stored.values() if tensor.dtype is not None)
    dtype: Any = requested or config.dtype or next(floats, torch.get_default_dtype())
    kwargs |= {"dtype": dtype, "use_safetensors": True, "force_download": False}  # The files were fetched above.

    model_class = model_class or class_named_by(config)
    with _blaming_the_config(source, kwargs):
        _refuse_endless(config, n_tensors=len(stored))
        skeleton = build_skeleton(model_class, config, trust_remote_code=kwargs.get("trust_remote_code", False))
    names = model_names(skeleton, stored, key_mapping=kwargs.get("key_mapping"))
    if not kwargs.get("ignore_mismatched_sizes"):
        refuse_misfits(stored, names, skeleton.state_dict())
    dtype_of = _dtype_plan(skeleton, dtype)
    fused = [name for name, (_, is_converted) in names.items() if is_converted]
    cast = [name for name, tensor in stored.items() if tensor.dtype not in (None, dtype_of(names[name][0]))]
    blocks = {f"{name}.{i}" for name, stack in find_stacks(skeleton) for i in range(len(stack))}
    is_drawn = _lacks_some(skeleton, {name for name, _ in names.values()})
    if not blocks or not (fused or cast):
        return MappedModel(model_class.from_pretrained(source, **kwargs), None, is_drawn=is_drawn)
    _make_room(source, offload_folder, dtype.itemsize * sum(stored[name].numel for name in fused))
    kwargs["device_map"] = _blocks_on_disk(skeleton, blocks)
    model = _load_offloaded(model_class, source, folder=offload_folder, kwargs=kwargs)
    kept = frozenset(name for name, _ in model.named_parameters() if dtype_of(name) != dtype)
    mapped = MappedModel(model, dtype, kept, is_drawn)
    return mapped if mapped.casts() else MappedModel(model, None, is_drawn=is_drawn)


def _load_quantised(model_class: Any, source: str, *, device: torch.device | None, kwargs: dict) -> MappedModel:
    if device is None:
        raise UnsupportedError(
            f"{source} is quantised (see its config.json, or `quantization_config`), and weights in 4 or 8 bits "
            "cannot take the small steps of training. Train an adapter on it (`peft_config=LoraConfig(...)`), or load "
            "the original checkpoint without `quantization_config`: it is streamed, so it need not fit the device."
        )
    return MappedModel(model_class.from_pretrained(source, device_map={"": device}, **kwargs), None)


def read_config(source: str, kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """Read the checkpoint's configuration with the overrides in `kwargs`; `CheckpointError` if a folder has none."""
    given = kwargs.get("config")
    if isinstance(given, PreTrainedConfig):
        return copy.deepcopy(given)
    if given is None and Path(source).is_dir() and not (checkpoint_folder(source, kwargs) / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json, so it is no model folder. Check the path.")
    # Attention and expert kernels are checked when a model is built, and the skeleton needs none.
    skip = ("config", "attn_implementation", "experts_implementation", "quantization_config")
    overrides = {name: value for name, value in kwargs.items() if name not in skip}
    config: Any
    with _blaming_the_config(source, kwargs):
        config, _ = AutoConfig.from_pretrained(given or source, return_unused_kwargs=True, **overrides)
        _check_fields(config)
    return config


def _check_fields(config: Any) -> None:
    """Check the fields of a config.json that transformers does not check and this module uses."""
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`architectures` must be a list of names, got {names!r}")
    if not isinstance(config.dtype, torch.dtype | None):
        raise ValueError(f"`dtype` must be the name of a dtype, got {config.dtype!r}")
    file = getattr(config, "transformers_weights", None)
    if file is not None and not (isinstance(file, str) and file.endswith((".safetensors", ".safetensors.index.json"))):
        raise ValueError(f"`transformers_weights` must name a file of safetensors, got {file!r}")
    parts = [getattr(config, name, None) for name in config.sub_configs]
    kernels = [getattr(part, "_attn_implementation", None) for part in (config, *parts)]
    if foreign := [name for name in kernels if isinstance(name, str) and "/" in name]:
        raise ValueError(
            f"`attn_implementation` {foreign[0]!r} is code from the hub; take it out, and pass it to the loader if "
            "you trust it"
        )


@contextmanager
def _blaming_the_config(source: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Name the config.json in any error that transformers raises for a wrong value in it."""
    try:
        yield
    except (ZO2TRLError, ImportError):
        raise
    except (
        Exception
    ) as error:  # a configuration's own checks raise it, or the arithmetic of any model with odd numbers
        if not Path(source).is_dir() or kwargs.get("config") is not None or kwargs.get("trust_remote_code"):
            raise
        why = f"{type(error).__name__}: {str(error)[:500]}"
        raise CheckpointError(
            f"{checkpoint_folder(source, kwargs) / 'config.json'} does not describe a model that transformers "
            f"{transformers.__version__} can build ({why}). Correct the file, or get it again from where the "
            "checkpoint came from."
        ) from error


def _refuse_endless(config: PreTrainedConfig, *, n_tensors: int) -> None:
    """Refuse far more layers than tensors, because a skeleton takes time and memory for each layer."""
    n_layers = getattr(config, "num_hidden_layers", None)
    if isinstance(n_layers, int) and n_layers > MAX_EMPTY_LAYERS + n_tensors:
        raise CheckpointError(
            f"`num_hidden_layers` is {str(n_layers)[:40]}, and there are {n_tensors} tensors. The configuration and "
            "the weights belong to different models."
        )


def class_named_by(config: PreTrainedConfig) -> Any:
    """Return the model class that the configuration names, else the causal language model class."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(
        named, PreTrainedModel
    ):  # the name may be that of anything in transformers
        return named
    # With remote code the class is in the checkpoint's own module, and `auto_map` maps `Auto...` classes to it.
    auto = "AutoModelForImageTextToText"
    return getattr(transformers, auto) if auto in (getattr(config, "auto_map", None) or {}) else AutoModelForCausalLM


def build_skeleton(model_class: Any, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model without storage, for its names, shapes and ties."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        if hasattr(model_class, "from_config"):
            return model_class.from_config(config, trust_remote_code=trust_remote_code)
        return model_class(config)


def model_names(
    skeleton: PreTrainedModel, names: Iterable[str], *, key_mapping: dict[str, str] | None = None
) -> dict[str, tuple[str, bool]]:
    """Map each name in the files to (name in the model, whether loading converts its values)."""
    transforms = get_model_conversion_mapping(skeleton, key_mapping)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    found = ((name, rename_source_key(name, renamings, converters, prefix, expected)) for name in names)
    return {name: (renamed, pattern is not None) for name, (renamed, pattern) in found}


def _lacks_some(skeleton: PreTrainedModel, stored: set[str]) -> bool:
    """Return whether a parameter has no values in the files, under any of its names if it is tied."""
    names: dict[int, set[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return any(stored.isdisjoint(known) for known in names.values())


def _take_dtype(kwargs: dict[str, Any]) -> torch.dtype | None:
    value, old_spelling = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    value = old_spelling if value is None else value
    if value is None or value == "auto":
        return None
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        near = difflib.get_close_matches(str(value), _DTYPE_NAMES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"`dtype` must be 'auto', a floating torch.dtype or its name, got {value!r}. Did you mean {near!r}?"
        )
    return dtype


def _refuse(kwargs: dict[str, Any]) -> None:
    device_map = kwargs.pop("device_map", None)
    if not (device_map is None or (isinstance(device_map, str) and device_map in ("cpu", "auto"))):
        raise UnsupportedError(
            f"`device_map={device_map!r}` cannot be honoured: {_STORE_PLACES}. Leave it out and set `device_memory` "
            "and `cpu_memory`."
        )
    for name, reason in _REFUSED.items():
        if kwargs.pop(name, None):
            raise UnsupportedError(f"`{name}` in `model_init_kwargs` cannot be honoured: {reason}. Leave it out.")
    if kwargs.get("use_safetensors") is False:
        raise UnsupportedError(
            "`use_safetensors=False` asks for pickled weights, which can run code. Leave it out, and turn pickled "
            "weights into safetensors with `zo2trl convert SRC DST`."
        )


def _refuse_adapter(source: str, kwargs: Mapping[str, Any]) -> None:
    name = "adapter_config.json"
    is_local = Path(source).is_dir()
    in_folder = (checkpoint_folder(source, kwargs) / name).is_file()
    if in_folder if is_local else cached_file(source, name, **hub_arguments(kwargs)):
        raise UnsupportedError(
            f"{source} is an adapter (it has an {name}). Load the base model and continue the adapter by wrapping the "
            "model with `PeftModel.from_pretrained(model, path, is_trainable=True)`."
        )


def _dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """Return a function from parameter name to dtype after loading: transformers keeps some in float32."""
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    kept = re.compile("|".join(patterns) or "(?!)")
    return lambda name: torch.float32 if kept.search(name) else dtype


def _make_room(source: str, folder: Path | None, n_bytes: int) -> None:
    if folder is None and n_bytes:
        raise ConfigError(
            f"{source} keeps experts one by one while the model fuses them, so {format_bytes(n_bytes)} have to be "
            "written once. Pass `offload_folder=` on a disk with that much room."
        )
    if folder is not None:
        LOCAL.make_dir(folder)
        if (free := LOCAL.free_bytes(folder)) < n_bytes:
            raise ConfigError(
                f"`offload_folder` {folder} has {format_bytes(free)} free; fusing the experts of {source} takes "
                f"{format_bytes(n_bytes)}. Free some space or choose another disk."
            )


def _blocks_on_disk(skeleton: nn.Module, blocks: set[str]) -> dict[str, str]:
    """Make a device map of every module, because transformers refuses a catch-all key together with "disk"."""
    ancestors = {block.rsplit(".", depth)[0] for block in blocks for depth in range(1, block.count(".") + 1)} | {""}
    places: dict[str, str] = dict.fromkeys(blocks, "disk")
    for name, module in skeleton.named_modules():
        if name not in ancestors:
            continue
        here = [key for key, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
        here += [key for key, _ in module.named_buffers(recurse=False)]
        full = [f"{name}.{key}" if name else key for key in here]
        places |= {key: "cpu" for key in full if key not in ancestors and key not in blocks}
    return places


def _load_offloaded(model_class: Any, source: str, *, folder: Path | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    # A map outlives its file's name: the folder is removed before this returns, so that a later crash leaves no bytes.
    with tempfile.TemporaryDirectory(dir=folder, prefix="experts-") as scratch:
        model = model_class.from_pretrained(source, offload_folder=scratch, **kwargs)
        _map_offloaded(model, _offload_index(model))
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        # The hooks leave the class's own method behind as an attribute of the instance.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
    del model.hf_device_map
    model.tie_weights(recompute_mapping=False)
    return model


def _offload_index(model: nn.Module) -> Mapping[str, Mapping[str, str]]:
    maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules())
    weights: Any = next(found for found in maps if found is not None)
    while hasattr(weights, "dataset"):
        weights = weights.dataset
    return weights.index


def _map_offloaded(model: nn.Module, index: Mapping[str, Mapping[str, str]]) -> None:
    """Replace every parameter without storage by a map of the tensor that `index` names, in the file's dtype."""
    opened: dict[str, Any] = {}
    mapped: dict[int, nn.Parameter] = {}  # parameters that are one object stay one
    for prefix, module in model.named_modules():
        for name, empty in module._parameters.items():
            if empty is None or empty.device.type != "meta":
                continue
            if id(empty) not in mapped:
                tensor = _read(f"{prefix}.{name}", index, opened)
                if tensor.shape != empty.shape:
                    raise CheckpointError(
                        f"{prefix}.{name} has shape {list(tensor.shape)} in the checkpoint and {list(empty.shape)} in "
                        "the model. The configuration and the weights belong to different models."
                    )
                mapped[id(empty)] = nn.Parameter(tensor, requires_grad=empty.requires_grad)
            module._parameters[name] = mapped[id(empty)]


def _read(name: str, index: Mapping[str, Mapping[str, str]], opened: dict[str, Any]) -> torch.Tensor:
    if name not in index:
        raise CheckpointError(f"The checkpoint lacks {name}, a part of a block. Check that its files are complete.")
    entry = index[name]
    file = entry["safetensors_file"]
    if file not in opened:
        opened[file] = safe_open(file, framework="pt")
    return opened[file].get_tensor(entry["weight_name"])
