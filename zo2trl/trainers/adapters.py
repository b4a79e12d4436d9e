"""This module prepares adapted and quantised models for training: it widens trained tensors to fp32, or refuses them.

Does not: make adapters, save them, or perturb them.
Invariant: what an adapter computes is what PEFT computes, except for whole modules that a 16-bit model trains a copy
of (`modules_to_save`, tuned norms): these compute in fp32 and return the model's dtype.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from zo2trl.engine.precision import output_embeddings
from zo2trl.errors import UnsupportedError
from zo2trl.files.sizes import format_bytes
from zo2trl.layout.quantised import quantised_bytes, quantised_parameters

__all__ = ["prepare_adapters", "refuse_full_quantised"]

logger = logging.getLogger(__name__)

_HALF = (torch.float16, torch.bfloat16)
_PACKS_ON_CPU = "support_avx512bf16_for_cpu"


def prepare_adapters(
    model: nn.Module, *, device: torch.device, casts: Mapping[nn.Parameter, torch.dtype] | None = None
) -> None:
    """Make a model's adapters ready to be trained, after PEFT or TRL has made them. Other models are not changed.

    - Trainable tensors on a quantised base become fp32 (TRL makes them bfloat16, which would round updates away).
    - So do copies of whole modules, unless the adapter beside them was made in 16 bit, by choice.
    - A wrapped head without a bias gets `bias = None`, because TRL's fused head reads that attribute.

    Args:
        device: where training runs.
        casts: dtypes that parameters of the base are going to have.

    Raises:
        UnsupportedError: quantised weights are on another device than `device`.
    """
    if not isinstance(model, PeftModel | PreTrainedModel):
        return
    if quantised := quantised_parameters(model):
        _refuse_other_device(quantised, device)
        n_bytes = sum(map(quantised_bytes, quantised.values()))
        logger.warning(
            "The base is quantised: its %d quantised weights (%s) stay on %s and are not streamed.",
            len(quantised), format_bytes(n_bytes), device,
        )  # fmt: skip
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in _HALF:
                parameter.data = parameter.data.float()
        for module in model.modules():
            # bitsandbytes packs 4-bit weights anew in a CPU's first forward, and unpacks them when they are saved, but
            # not to the same numbers: a run that saves a checkpoint would continue with another base.
            if hasattr(module, _PACKS_ON_CPU):
                setattr(module, _PACKS_ON_CPU, False)
    copies = _trained_copies(model)
    held = {id(parameter) for copy, _ in copies for parameter in copy.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    if not any(parameter.dtype in _HALF for parameter in others):
        heads = list(output_embeddings(model))
        for copy, wrapper in copies:
            dtype = next((casts or {}).get(p, p.dtype) for p in _original(wrapper).parameters())
            if dtype in _HALF:
                _widen(copy, dtype=None if wrapper in heads else dtype)
    for wrapper in (module for module in model.modules() if isinstance(module, TrainableTokensWrapper)):
        if "bias" not in wrapper._parameters and getattr(wrapper.original_module, "bias", None) is None:
            wrapper.register_parameter("bias", None)


def refuse_full_quantised(model: Any, *, is_adapted: bool) -> None:
    """Refuse to train quantised weights themselves.

    Args:
        model: a loaded model; anything else is accepted.
        is_adapted: whether adapters are going to be put on it. A model may have them already.

    Raises:
        UnsupportedError: the message names the two ways out.
    """
    has_adapters = is_adapted or isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    if getattr(model, "is_quantized", False) and not has_adapters:
        raise UnsupportedError(
            "`model` is quantised, and weights in 4 or 8 bits cannot take the small steps of training. Train an "
            "adapter on it (`peft_config=LoraConfig(...)`, or a PeftModel), or load the original checkpoint without "
            "`quantization_config`: it is streamed, so it need not fit the device."
        )


def _refuse_other_device(quantised: dict[str, nn.Parameter], device: torch.device) -> None:
    for name, parameter in quantised.items():
        if parameter.device.type != device.type:
            raise UnsupportedError(
                f"{name} is quantised and lies on {parameter.device}, but training runs on {device}, and quantised "
                f'weights are not moved. Load the model with `device_map={{"": "{device}"}}`, or pass its path.'
            )


def _trained_copies(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the copies of whole modules that are trained in place of the originals, each with its wrapper."""
    found: list[tuple[nn.Module, nn.Module]] = []
    for module in model.modules():
        held = (
            module.modules_to_save if isinstance(module, ModulesToSaveWrapper)
            else module.ln_tuning_layers if isinstance(module, LNTuningLayer) else {}
        )  # fmt: skip
        found += [(copy, module) for copy in held.values() if any(p.requires_grad for p in copy.parameters())]
    return found


def _original(wrapper: Any) -> nn.Module:
    return wrapper.original_module if isinstance(wrapper, ModulesToSaveWrapper) else wrapper.base_layer


def _widen(copy: nn.Module, *, dtype: torch.dtype | None) -> None:
    """Make a module compute in fp32 and return `dtype`; with None its output stays fp32."""
    for parameter in copy.parameters():
        if parameter.dtype in _HALF:
            parameter.data = parameter.data.float()
    copy.register_forward_pre_hook(_widen_inputs)
    if dtype is not None:
        copy.register_forward_hook(_Narrow(dtype))


def _widen_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    is_half = (isinstance(value, torch.Tensor) and value.dtype in _HALF for value in inputs)
    return tuple(value.float() if half else value for value, half in zip(inputs, is_half, strict=True))


class _Narrow:
    """This forward hook casts fp32 outputs back. It is an object of this module, so that models stay copyable."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return output.to(self._dtype) if isinstance(output, torch.Tensor) and output.dtype == torch.float32 else output
