"""Forward-only fine-tuning of language models that do not fit the GPU, as drop-in transformers and TRL trainers."""

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

# Imported on first use: `zo2trl --version` should not wait for torch, and ZOTrainer should not need TRL.
_RESIDENCY = {
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
    if name not in _RESIDENCY:
        raise AttributeError(f"module 'zo2trl' has no attribute {name!r}")
    return getattr(import_module(_RESIDENCY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
