"""The three-line recipe of docs/new_trainers.md works for any TRL trainer whose loss is a forward pass."""

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from tests.support.crashes import Crash, resumed, straight
from tests.support.preferences import lora
from tests.support.runs import QUIET, STREAMED_FROM_DISK, closing, differing, prompts, step_logs, weights_of
from tests.support.tokenizer import tiny_tokenizer
from tests.support.trainings import small_model
from zo2trl.errors import UnsupportedError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "new_trainers.md"


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """Run the page's block and return what it defines."""
    defined: dict[str, Any] = {"__name__": "recipe"}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)[0], defined)
    return defined


def rows(n_rows: int = 8) -> Dataset:
    return prompts(n_rows).add_column("label", [i % 2 == 0 for i in range(n_rows)])


def kto_trainer(recipe: dict[str, Any], folder: Path, *, extra: dict | None = None, **options: Any) -> Any:
    config = recipe["ZOKTOConfig"](**{"output_dir": str(folder), **QUIET, "max_length": 32, **options})
    named = {"processing_class": tiny_tokenizer(), "train_dataset": rows(), **(extra or {})}
    return recipe["ZOKTOTrainer"](model=small_model(), args=config, **named)


def test_three_lines_make_a_trainer_that_streams_resumes_and_counts_once(recipe: dict, tmp_path: Path) -> None:
    def make(folder: Path, **options: Any) -> Any:
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **options}
        return kto_trainer(recipe, folder, extra={"peft_config": lora()}, **options)

    wanted = straight(make, tmp_path / "straight")
    found = resumed(make, tmp_path / "crashed", [Crash("step_end", 3)], lives=[STREAMED_FROM_DISK])
    assert wanted.difference(found) == ""
    with closing(make(tmp_path / "counted")) as trainer:
        n_tokens = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in trainer.train_dataset)
    assert f"('num_tokens', {float(n_tokens)})" in wanted.logs[3]  # after an epoch, whatever probes have seen


def test_its_loss_is_that_of_the_plain_trainer(recipe: dict, tmp_path: Path) -> None:
    with closing(kto_trainer(recipe, tmp_path / "zo", extra={"peft_config": lora()}, **STREAMED_FROM_DISK)) as trainer:
        ours = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    named = {"report_to": "none", "bf16": False, "use_cpu": True, "max_length": 32, "disable_tqdm": True}
    config = KTOConfig(output_dir=str(tmp_path / "plain"), per_device_eval_batch_size=2, **named)
    named = {"train_dataset": rows(), "processing_class": tiny_tokenizer(), "peft_config": lora()}
    plain = KTOTrainer(small_model(), args=config, **named)
    assert ours == pytest.approx(plain.evaluate(plain.train_dataset)["eval_loss"], abs=1e-6)


def test_full_weights_train_on_precomputed_references(recipe: dict, tmp_path: Path) -> None:
    options = {"precompute_ref_log_probs": True, "max_steps": 2, **STREAMED_FROM_DISK}
    with closing(kto_trainer(recipe, tmp_path, **options)) as trainer:
        before = weights_of(trainer.model)
        trainer.train()
        assert step_logs(trainer)[0]["zo/projected_grad"] != 0
        assert sorted(differing(weights_of(trainer.model), before)) == sorted(before)


@pytest.mark.parametrize("given", [True, False], ids=["given", "to be copied"])
def test_a_second_whole_model_is_refused(recipe: dict, given: bool, tmp_path: Path) -> None:
    extra = {"ref_model": small_model(seed=1)} if given else {}
    with pytest.raises(UnsupportedError, match="second whole model"):
        kto_trainer(recipe, tmp_path, extra=extra)
