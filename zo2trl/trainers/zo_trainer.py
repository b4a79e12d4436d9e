"""This module defines ZOTrainer: transformers' Trainer, trained with forward passes only."""

from transformers import Trainer

from zo2trl.trainers.arguments.config import ZOConfig
from zo2trl.trainers.mixin import ZOTrainerMixin

__all__ = ["ZOConfig", "ZOTrainer"]


class ZOTrainer(ZOTrainerMixin, Trainer):
    """
    [`~transformers.Trainer`] that trains with forward passes only, out of GPU memory, host memory and disk.

    Works with any model class that returns a loss (or with `compute_loss_func`): causal, masked and
    sequence-to-sequence language models, sequence classification. Takes the arguments of [`~transformers.Trainer`],
    with two differences:

    Args:
        model ([`~transformers.PreTrainedModel`] or `str`):
            A loaded model, or the path of a checkpoint, which is then read unit by unit and never held in memory. The
            class is the one its configuration names.
        args ([`ZOConfig`] or [`~transformers.TrainingArguments`], *optional*):
            A plain `TrainingArguments` is converted with ZO defaults.
    """

    config_class = ZOConfig
