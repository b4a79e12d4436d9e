"""This module defines ZOSFTTrainer: TRL's SFTTrainer, trained with forward passes only."""

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from zo2trl.planning.workload import Workload
from zo2trl.trainers.arguments.config import ZOArguments
from zo2trl.trainers.sft_workload import count_like
from zo2trl.trainers.trl_mixin import ZOTRLMixin

__all__ = ["ZOSFTConfig", "ZOSFTTrainer"]


@dataclass
class ZOSFTConfig(ZOArguments, SFTConfig):
    """
    Configuration of [`ZOSFTTrainer`]: the parameters of [`ZOArguments`] and of [`~trl.SFTConfig`].
    """


class ZOSFTTrainer(ZOTRLMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that trains with forward passes only, out of GPU memory, host memory and disk.

    Takes the arguments of [`~trl.SFTTrainer`], with two differences:

    Args:
        model ([`~transformers.PreTrainedModel`] or `str`):
            A loaded model, or the path of a checkpoint, which is then read unit by unit in the checkpoint's own dtype
            (unless `model_init_kwargs["dtype"]` says otherwise) and never held in memory.
        args ([`ZOSFTConfig`] or [`~trl.SFTConfig`], *optional*):
            A plain `SFTConfig` is converted with ZO defaults.
    """

    config_class = ZOSFTConfig
    takes_labels = True

    def _count_pass(self, inputs: Any) -> Workload | None:
        if self.objective is not None and self.objective.generates:
            return None
        autocast = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return count_like(self.model, inputs, autocast=autocast, on_cpu=self.args.device.type == "cpu")
