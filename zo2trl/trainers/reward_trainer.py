"""This module defines ZORewardTrainer: TRL's RewardTrainer, trained with forward passes only."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer, suppress_seqcls_warning

from zo2trl.trainers.arguments.config import ZOArguments
from zo2trl.trainers.trl_mixin import ZOTRLMixin

__all__ = ["ZORewardConfig", "ZORewardTrainer"]


@dataclass
class ZORewardConfig(ZOArguments, RewardConfig):
    """
    Configuration of [`ZORewardTrainer`]: the parameters of [`ZOArguments`] and of [`~trl.RewardConfig`].
    """


class ZORewardTrainer(ZOTRLMixin, RewardTrainer):
    """
    [`~trl.RewardTrainer`] that trains with forward passes only, out of GPU memory, host memory and disk.

    Takes the arguments of [`~trl.RewardTrainer`], with two differences:

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `str`):
            A sequence classification model with one label, or the path of a checkpoint, which is then read unit by
            unit in the checkpoint's own dtype (unless `model_init_kwargs["dtype"]` says otherwise) and never held in
            memory. The head (`score`) is drawn from `seed` if the checkpoint has none. Adapters of the task
            type `SEQ_CLS` train it; with another task type, name it in `modules_to_save`.
        args ([`ZORewardConfig`] or [`~trl.RewardConfig`], *optional*):
            A plain `RewardConfig` is converted with ZO defaults.
    """

    config_class = ZORewardConfig
    rows_are_pairs = True
    scores_pairs = True

    def _what_to_load(self) -> dict[str, Any]:
        return {"model_class": AutoModelForSequenceClassification, "num_labels": 1}

    def _load(self, path: str, given: dict[str, Any]) -> nn.Module:
        with suppress_seqcls_warning():
            return super()._load(path, given)
