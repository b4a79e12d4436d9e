"""ZORewardTrainer has the margins, the centring, the drawn head and the metrics of TRL's RewardTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from tests.support.crashes import Crash, resumed, straight
from tests.support.preferences import pairs, reward_trainer, scorer_lora, tiny_scorer
from tests.support.runs import EVERYTHING_ON_DEVICE, STREAMED_FROM_DISK, closing, differing, step_logs, weights_of
from tests.support.tokenizer import tiny_tokenizer
from tests.support.trainings import small_model
from zo2trl.errors import UnsupportedError

PLACES = pytest.mark.parametrize("place", [EVERYTHING_ON_DEVICE, STREAMED_FROM_DISK], ids=["device", "disk"])


def plain_loss(folder: Path, rows: Any, **options: Any) -> float:
    named = {"report_to": "none", "bf16": False, "use_cpu": True, "max_length": 32, "disable_tqdm": True}
    config = RewardConfig(output_dir=str(folder), per_device_eval_batch_size=2, **named, **options)
    plain = RewardTrainer(tiny_scorer(), config, train_dataset=rows, processing_class=tiny_tokenizer())
    return plain.evaluate(plain.train_dataset)["eval_loss"]


@pytest.mark.parametrize("margin", [True, False], ids=["margins", "no margins"])
@pytest.mark.parametrize("centre", [0.5, None], ids=["centred", "not centred"])
def test_the_loss_is_the_plain_trainers_loss(margin: bool, centre: float | None, tmp_path: Path) -> None:
    rows, options = pairs(4, margin=margin), {"center_rewards_coefficient": centre}
    with closing(reward_trainer(tmp_path / "zo", rows=rows, **options)) as trainer:
        ours = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert ours == pytest.approx(plain_loss(tmp_path / "plain", rows, **options), abs=1e-6)


def test_streamed_weights_train_as_resident_ones_and_the_head_is_trained(tmp_path: Path) -> None:
    runs = []
    for name, place in (("device", EVERYTHING_ON_DEVICE), ("disk", STREAMED_FROM_DISK)):
        with closing(reward_trainer(tmp_path / name, rows=pairs(margin=True), **place)) as trainer:
            before = weights_of(trainer.model)
            trainer.train()
            assert sorted(differing(weights_of(trainer.model), before)) == sorted(before)
            assert "score.weight" in before
            runs.append((weights_of(trainer.model), [log["zo/projected_grad"] for log in step_logs(trainer)]))
    assert runs[0][1] == runs[1][1]
    assert differing(runs[0][0], runs[1][0]) == []


@PLACES
def test_a_language_model_given_by_path_gets_a_head(place: dict, tmp_path: Path) -> None:
    small_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "start")
    tiny_tokenizer().save_pretrained(tmp_path / "start")
    with closing(reward_trainer(tmp_path / "run", str(tmp_path / "start"), **place)) as trainer:
        head = trainer.model.score.weight.detach().clone()
        assert head.shape[0] == 1
        assert trainer.model.dtype == torch.bfloat16
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        found = weights_of(trainer.model)
    assert not torch.equal(found["score.weight"], head)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert differing(weights_of(reloaded), found) == []


def test_adapters_and_the_head_are_trained_and_reload_with_plain_peft(tmp_path: Path) -> None:
    extra = {"peft_config": scorer_lora()}
    with closing(reward_trainer(tmp_path / "run", extra=extra, learning_rate=1e-2, **STREAMED_FROM_DISK)) as trainer:
        before = weights_of(trainer.model)
        trainer.train()
        moved = differing(weights_of(trainer.model), before)
        assert sorted(moved) == sorted(name for name, p in trainer.model.named_parameters() if p.requires_grad)
        assert any("score" in name for name in moved)
        trainer.save_model(str(tmp_path / "adapter"))
        found = weights_of(trainer.model)
    reloaded = PeftModel.from_pretrained(tiny_scorer(), str(tmp_path / "adapter"))
    assert differing(weights_of(reloaded), found) == []


def test_metrics_are_counted_once_and_filed_under_the_right_mode(tmp_path: Path) -> None:
    def agreement(predictions: Any) -> dict[str, float]:
        return {"n": float(len(predictions.predictions))}

    extra = {"eval_dataset": {"a": pairs(4), "b": pairs(2)}, "compute_metrics": agreement}
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
    with closing(reward_trainer(tmp_path, rows=pairs(16), extra=extra, **options)) as trainer:
        n_tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset)
        trainer.train()
        history, logs = trainer.state.log_history, step_logs(trainer)
    assert logs[-1]["num_tokens"] == n_tokens
    assert all({"accuracy", "margin", "mean_reward"} <= log.keys() for log in logs)
    assert not any(key.startswith("eval_") for log in logs for key in log)
    assert {"eval_a_n", "eval_b_n"} <= {key for log in history for key in log}


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "full"])
def test_crashes_leave_no_trace(adapted: bool, tmp_path: Path) -> None:
    rows = pairs(11)

    def make(folder: Path, **options: Any) -> Any:
        extra = {"eval_dataset": {"a": pairs(2), "b": pairs(3, start=20)}}
        extra |= {"peft_config": scorer_lora()} if adapted else {}
        options = {
            "max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3,
            "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2, **options,
        }  # fmt: skip
        return reward_trainer(folder, rows=rows, extra=extra, **options)

    lives = [EVERYTHING_ON_DEVICE, {**STREAMED_FROM_DISK, "write_back_every": "2"}]
    wanted = straight(make, tmp_path / "straight")
    crashes = [Crash("step_end", 2), Crash("evaluate", 4)]
    assert wanted.difference(resumed(make, tmp_path / "crashed", crashes, lives=lives)) == ""


def test_accuracy_is_the_share_of_pairs_that_are_ordered_rightly(tmp_path: Path) -> None:
    options = {"objective": "accuracy", "per_device_train_batch_size": 8, "zo_eps": 0.3}
    with closing(reward_trainer(tmp_path, rows=pairs(8), extra={"eval_dataset": pairs(8)}, **options)) as trainer:
        trainer.train()
        logs, metrics = step_logs(trainer), trainer.evaluate()
    for log in logs:
        losses = (log["zo/loss_plus"], log["zo/loss_minus"])
        assert all(8 * loss == pytest.approx(round(8 * loss)) for loss in losses)
        assert log["objective/accuracy"] == pytest.approx(1 - sum(losses) / 2)
    assert len({log["objective/accuracy"] for log in logs}) > 1
    assert metrics["eval_objective/accuracy"] == pytest.approx(metrics["eval_accuracy"])


def test_objectives_that_pairs_cannot_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="pair of answers"):
        reward_trainer(tmp_path, objective="exact_match", objective_max_new_tokens=4)
    with pytest.raises(UnsupportedError, match=r"`labels`.*pair of answers"):
        reward_trainer(tmp_path, extra={"objective": lambda outputs, labels: outputs.logits.mean()})
