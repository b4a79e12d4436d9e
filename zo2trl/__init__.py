"""zo2trl fine-tunes language models that do not fit the GPU, with forward passes only and trainers as TRL's."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo2trl.errors import ZO2TRLError
    from zo2trl.trainers.arguments.config import ZOConfig
    from zo2trl.trainers.dpo_trainer import ZODPOConfig, ZODPOTrainer
    from zo2trl.trainers.objective.objectives import OutputObjective, TextObjective
    from zo2trl.trainers.reward_trainer import ZORewardConfig, ZORewardTrainer
    from zo2trl.trainers.sft_trainer import ZOSFTConfig, ZOSFTTrainer
    from zo2trl.trainers.zo_trainer import ZOTrainer

__version__ = "0.1.0"
__all__ = [
    "OutputObjective", "TextObjective", "ZO2TRLError", "ZOConfig", "ZODPOConfig", "ZODPOTrainer", "ZORewardConfig",
    "ZORewardTrainer", "ZOSFTConfig", "ZOSFTTrainer", "ZOTrainer", "__version__",
]  # fmt: skip

# They are imported on first use: `zo2trl --version` should not wait for torch, and ZOTrainer should not need TRL.
_MODULE_OF = {
    "OutputObjective": "zo2trl.trainers.objective.objectives",
    "TextObjective": "zo2trl.trainers.objective.objectives",
    "ZO2TRLError": "zo2trl.errors",
    "ZOConfig": "zo2trl.trainers.arguments.config",
    "ZODPOConfig": "zo2trl.trainers.dpo_trainer",
    "ZODPOTrainer": "zo2trl.trainers.dpo_trainer",
    "ZORewardConfig": "zo2trl.trainers.reward_trainer",
    "ZORewardTrainer": "zo2trl.trainers.reward_trainer",
    "ZOSFTConfig": "zo2trl.trainers.sft_trainer",
    "ZOSFTTrainer": "zo2trl.trainers.sft_trainer",
    "ZOTrainer": "zo2trl.trainers.zo_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'zo2trl' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
