"""This module counts the work of one pass of supervised fine-tuning on a model without weights.

Plans and the start-up report of a run both use it.

Does not: load weights, or depend on a machine.
Invariant: a plan and a run of the same model on batches of the same shape count the same.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zo2trl.errors import ConfigError
from zo2trl.forecast.workload import count_pass, fake_tensors, make_fake
from zo2trl.planning.workload import Workload

__all__ = ["build_model", "count_batch", "count_like"]

logger = logging.getLogger(__name__)


def build_model(
    model_class: Any, config: PreTrainedConfig, *, dtype: torch.dtype, peft_config: Any = None
) -> tuple[nn.Module, Callable[[torch.Tensor], Any]]:
    """Build the model that the trainer would make, on the meta device, and a function that runs its loss on token ids.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    from trl.trainer import utils

    with torch.device("meta"):
        build = getattr(model_class, "from_config", None) or model_class._from_config
        model = build(config, dtype=dtype).eval()
        fuse = getattr(utils, "add_fused_lm_head", None)
        options: dict[str, Any] = {}
        if fuse is not None and model.get_output_embeddings() is not None:
            fuse(model, outputs=("log_probs", "entropy", "is_top1"))
            options["fused_lm_head"] = True
        if peft_config is not None:
            from peft import get_peft_model

            try:
                model = get_peft_model(model, peft_config).eval()
            except ValueError as error:
                raise ConfigError(f"The adapter does not fit {config.name_or_path or 'the model'}: {error}") from error
    return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False, **options)


def count_batch(
    model: nn.Module,
    run: Callable[[torch.Tensor], Any],
    shape: tuple[int, int],
    *,
    autocast: torch.dtype | None,
    on_cpu: bool,
) -> Workload | None:
    """Count one pass over token ids of this shape; return None if the model's forward reads values.

    Args:
        model, run: what `build_model` returned; the model gets fake tensors.
    """
    mode = fake_tensors()
    make_fake(model, mode=mode)
    with mode:
        ids = torch.zeros(shape, dtype=torch.long)
    try:
        with nullcontext() if on_cpu else _one_read_of_logits():
            return count_pass(model, lambda: run(ids), mode=mode, autocast=autocast, on_cpu=on_cpu)
    except Exception:  # a forward that reads values may raise anything
        logger.debug("A pass could not be counted.", exc_info=True)
        return None


@contextmanager
def _one_read_of_logits() -> Iterator[None]:
    """Within the block TRL's fused head reads each tile of logits once, as its kernel on a GPU does.

    Fake tensors are those of a CPU, where the head makes several fp32 copies of every tile: for OPT-1.3B and 8,192
    tokens these would count as 2 GB and three quarters of all bytes that a pass moves.
    """
    try:
        from trl.kernels import chunked_logprob
    except ImportError:  # another version of TRL, whose head is counted as it is
        yield
        return
    with mock.patch.object(chunked_logprob, "_forward_tile", lambda tile, *_, **__: tile.amax(dim=-1), create=True):
        yield


def count_like(
    trained: nn.Module, inputs: Mapping[str, Any], *, autocast: torch.dtype | None, on_cpu: bool
) -> Workload | None:
    """Count one pass of a model like the trained one; return None if none can be built from its configuration.

    Args:
        inputs: a batch with `input_ids`.
    """
    ids = inputs.get("input_ids")
    peft_configs: Any = getattr(trained, "peft_config", None) or {}
    base: Any = trained.get_base_model() if peft_configs else trained  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel) or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    peft_config = next(iter(peft_configs.values()), None)
    try:
        with torch.random.fork_rng(devices=[]):  # building must not move the training's own generator
            model, run = build_model(type(base), base.config, dtype=base.dtype, peft_config=peft_config)
        _copy_dtypes(model, trained)
    except Exception:
        logger.debug("No model could be built to count its pass.", exc_info=True)
        return None
    return count_batch(model, run, (ids.shape[0], ids.shape[1]), autocast=autocast, on_cpu=on_cpu)


def _copy_dtypes(model: nn.Module, trained: nn.Module) -> None:
    """Give parameters the dtypes that the trained model has them in.

    Raises:
        ValueError: the two models have different parameters.
    """
    wanted = dict(trained.named_parameters())
    named = dict(model.named_parameters())
    if named.keys() != wanted.keys():
        raise ValueError("the built model has other parameters than the trained one")
    for name, parameter in named.items():
        if wanted[name].dtype != parameter.dtype and wanted[name].dtype.is_floating_point:
            parameter.data = parameter.data.to(wanted[name].dtype)
