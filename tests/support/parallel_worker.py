"""One process of a training that a launcher starts: `torchrun ... -m tests.support.parallel_worker FOLDER OPTIONS`.

OPTIONS is JSON: options of the config, and of these: `kind` (see `KINDS`), `dies_at` (a step after which the last
rank kills itself, if nothing was trained before). What came out is in FOLDER/report-RANK.json.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from tests.support.models import tiny_model, tiny_rows
from tests.support.preferences import dpo_trainer, lora, pairs, reward_trainer
from tests.support.runs import STREAMED_FROM_DISK, prompts, sft_trainer, step_logs, weights_of, zo_trainer
from tests.support.trainings import masking_collator, stream, unmasked


def digest_of(model: nn.Module) -> str:
    """Return a digest of all weights."""
    found = hashlib.sha256()
    for name, weights in weights_of(model).items():
        found.update(name.encode())
        found.update(weights.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def trainer_of(folder: Path, *, kind: str = "plain", **options: Any) -> Any:
    """The training that every process makes."""
    return KINDS[kind](folder, **{"max_steps": 6, "save_strategy": "no", **options})


def _sft(folder: Path, **options: Any) -> Any:
    return sft_trainer(
        folder, tiny_model("llama"), prompts(16), extra={"eval_dataset": prompts(8, start=20)}, **options
    )


def _masking(folder: Path, **options: Any) -> Any:
    extra = {"data_collator": masking_collator()}
    return zo_trainer(folder, tiny_model("roberta-mlm"), unmasked(), extra=extra, **options)


def _of_family(name: str, folder: Path, **options: Any) -> Any:
    return zo_trainer(folder, tiny_model(name), tiny_rows(name, 16), **options)


def _with_own_loss(folder: Path, **options: Any) -> Any:
    return zo_trainer(
        folder, tiny_model("opt"), tiny_rows("opt", 16), extra={"compute_loss_func": mean_of_batch}, **options
    )


def mean_of_batch(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss that does not care how many items there are in the whole step."""
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _streaming(folder: Path, **options: Any) -> Any:
    return zo_trainer(folder, tiny_model("opt"), stream(tiny_rows("opt", 16)), **options)


def _from_disk(folder: Path, **options: Any) -> Any:
    return _sft(folder, **{**STREAMED_FROM_DISK, **options})


KINDS: dict[str, Callable[..., Any]] = {
    "plain": partial(_of_family, "opt"),
    "sft": _sft,
    "sft from disk": _from_disk,
    "masking": _masking,
    "classes": partial(_of_family, "roberta-classes"),
    "seq2seq": partial(_of_family, "t5"),
    "experts": partial(_of_family, "mixtral"),
    "own loss": _with_own_loss,
    "stream": _streaming,
    "dpo": lambda folder, **options: dpo_trainer(folder, rows=pairs(16), **options),
    "reward": lambda folder, **options: reward_trainer(folder, rows=pairs(16), **options),
    "dpo of adapters": lambda folder, **options: dpo_trainer(
        folder, rows=pairs(16), extra={"peft_config": lora()}, **options
    ),
    "accuracy": lambda folder, **options: _sft(folder, objective="accuracy", **options),
}


def outcome(trainer: Any) -> dict[str, Any]:
    """Collect the values that tests compare."""
    logs = trainer.state.log_history
    return {
        "weights": digest_of(trainer.model),
        "losses": [entry["loss"] for entry in step_logs(trainer)],
        "eval_losses": [entry["eval_loss"] for entry in logs if "eval_loss" in entry],
        "logs": [{k: v for k, v in entry.items() if "per_second" not in k and "runtime" not in k} for entry in logs],
    }


class Dying(TrainerCallback):
    """kill -9 after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    dies_at, rank, size = (
        options.pop("dies_at", None),
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )
    trainer = trainer_of(folder, **options)
    was_there = (folder / "store" / "rank-0" / "journal").exists()
    if dies_at is not None and not was_there and rank == size - 1:
        trainer.add_callback(Dying(dies_at))
    trainer.train(resume_from_checkpoint=was_there or None)
    (folder / f"report-{rank}.json").write_text(json.dumps(outcome(trainer)))
    trainer.close()


if __name__ == "__main__":
    main()
