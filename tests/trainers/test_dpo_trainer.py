"""ZODPOTrainer has the losses, metrics and adapters of TRL's DPOTrainer, and never a second copy of the model."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.support.crashes import Crash, resumed, straight
from tests.support.preferences import dpo_trainer, lora, pairs
from tests.support.runs import (
    EVERYTHING_ON_DEVICE,
    STREAMED_FROM_CPU,
    STREAMED_FROM_DISK,
    closing,
    differing,
    step_logs,
    weights_of,
)
from tests.support.tokenizer import tiny_tokenizer
from tests.support.trainings import small_model
from zo2trl.errors import ConfigError, UnsupportedError

LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def plain_trainer(folder: Path, model: Any, *, extra: dict | None = None, **options: Any) -> DPOTrainer:
    named = {"report_to": "none", "bf16": False, "use_cpu": True, "max_length": 32, "disable_tqdm": True}
    config = DPOConfig(output_dir=str(folder), per_device_eval_batch_size=2, **named, **options)
    return DPOTrainer(
        model=model, args=config, train_dataset=pairs(), processing_class=tiny_tokenizer(), **(extra or {})
    )


def saved_model(folder: Path) -> str:
    small_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# -- the loss


def test_every_loss_is_that_of_the_plain_trainer(tmp_path: Path) -> None:
    extra = {"peft_config": lora()}
    plain = plain_trainer(tmp_path / "plain", small_model(), extra=extra, label_smoothing=0.1)
    with closing(dpo_trainer(tmp_path / "zo", extra=extra, label_smoothing=0.1, **STREAMED_FROM_DISK)) as trainer:
        for name in LOSSES:
            plain.loss_types = trainer.loss_types = [name]
            ours, theirs = (one.evaluate(one.train_dataset.select(range(4)))["eval_loss"] for one in (trainer, plain))
            assert ours == pytest.approx(theirs, abs=2e-6, rel=1e-5), name


def test_every_loss_trains_together_with_others(tmp_path: Path) -> None:
    options = {"loss_type": LOSSES, "loss_weights": [1 / len(LOSSES)] * len(LOSSES), "label_smoothing": 0.1}
    with closing(dpo_trainer(tmp_path, extra={"peft_config": lora()}, **options)) as trainer:
        trainer.train()
        assert all(abs(log["zo/projected_grad"]) > 0 for log in step_logs(trainer))


@pytest.mark.parametrize("option", [{"ld_alpha": 0.5}, {"use_weighting": True}, {"f_divergence_type": "forward_kl"}])
def test_variants_of_the_loss_are_those_of_the_plain_trainer(option: dict, tmp_path: Path) -> None:
    extra = {"peft_config": lora()}
    plain = plain_trainer(tmp_path / "plain", small_model(), extra=extra, **option)
    with closing(dpo_trainer(tmp_path / "zo", extra=extra, **option)) as trainer:
        ours, theirs = (one.evaluate(one.train_dataset)["eval_loss"] for one in (trainer, plain))
    assert ours == pytest.approx(theirs, abs=2e-6, rel=1e-5)


# -- the reference


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "full"])
def test_every_place_trains_to_the_same_weights(adapted: bool, tmp_path: Path) -> None:
    runs = []
    for name, place in (("device", EVERYTHING_ON_DEVICE), ("cpu", STREAMED_FROM_CPU), ("disk", STREAMED_FROM_DISK)):
        extra = {"peft_config": lora()} if adapted else {}
        with closing(dpo_trainer(tmp_path / name, extra=extra, learning_rate=1e-2, **place)) as trainer:
            before = weights_of(trainer.model)
            trainer.train()
            moved = differing(weights_of(trainer.model), before)
            assert sorted(moved) == sorted(name for name, p in trainer.model.named_parameters() if p.requires_grad)
            runs.append((weights_of(trainer.model), [log["zo/loss_plus"] for log in step_logs(trainer)]))
    assert runs[0][1] == runs[1][1] == runs[2][1]
    assert differing(runs[0][0], runs[1][0]) == differing(runs[0][0], runs[2][0]) == []


def test_without_adapters_the_reference_is_the_model_before_training_and_no_copy_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_copy(*_: Any, **__: Any) -> None:
        raise AssertionError("a second model was loaded")

    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", no_copy)
    extra = {"eval_dataset": {"near": pairs(4), "far": pairs(4, start=20)}}
    with caplog.at_level(logging.WARNING), closing(dpo_trainer(tmp_path, extra=extra, learning_rate=1e-2)) as trainer:
        assert trainer.ref_model is None
        assert trainer.evaluate()["eval_near_loss"] == pytest.approx(0.693147, abs=1e-6)  # log 2: no step yet
        before = list(trainer.train_dataset["ref_chosen_logps"])
        trainer.train()
        after = trainer.evaluate()
    told = [record for record in caplog.records if "precompute_ref_log_probs" in record.getMessage()]
    assert len(told) == 1
    assert before == list(trainer.train_dataset["ref_chosen_logps"])
    assert after["eval_far_loss"] != pytest.approx(0.693147, abs=1e-6)


def test_with_adapters_the_reference_is_the_base_in_every_probe(tmp_path: Path) -> None:
    extra = {"peft_config": lora()}
    found = []
    for precompute in (False, True):
        options = {"precompute_ref_log_probs": precompute, "learning_rate": 1e-2, **STREAMED_FROM_DISK}
        with closing(dpo_trainer(tmp_path / str(precompute), extra=extra, **options)) as trainer:
            trainer.train()
            found.append([log["zo/projected_grad"] for log in step_logs(trainer)])
    assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-3)


def test_a_loss_that_switches_adapters_off_in_the_middle_of_a_traversal_does_not_switch_them_off_for_others(
    tmp_path: Path,
) -> None:
    # TRL's own reference, evaluated inside every pass, so passes are at different layers meanwhile.
    with closing(dpo_trainer(tmp_path, extra={"peft_config": lora()}, **STREAMED_FROM_DISK)) as trainer:
        trainer.model.eval()
        batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(3)]

        def policy_then_reference(batch: dict) -> tuple[float, float]:
            ids = batch["input_ids"]
            with torch.no_grad():
                first = trainer.model(input_ids=ids).logits.sum().item()
                reference = trainer.compute_ref_log_probs(trainer.model, batch)[0].item()
            return first, reference

        def reference_then_policy(batch: dict) -> tuple[float, float]:
            reference = trainer.compute_ref_log_probs(trainer.model, batch)[0].item()
            return trainer.model(input_ids=batch["input_ids"]).logits.sum().item(), reference

        alone = [trainer.engine.run_clean([lambda b=b: policy_then_reference(b)])[0] for b in batches]
        orders = (policy_then_reference, reference_then_policy, policy_then_reference)
        together = trainer.engine.run_clean([lambda f=f, b=b: f(b) for f, b in zip(orders, batches, strict=True)])
        assert together == alone
        assert not trainer.model._adapters_disabled


def test_a_reference_model_is_asked_before_training_and_leaves_the_device(tmp_path: Path) -> None:
    reference = small_model(seed=3)
    plain = plain_trainer(tmp_path / "plain", small_model(), extra={"ref_model": small_model(seed=3)})
    with closing(dpo_trainer(tmp_path / "zo", extra={"ref_model": reference}, **STREAMED_FROM_DISK)) as trainer:
        ours, theirs = (one.evaluate(one.train_dataset)["eval_loss"] for one in (trainer, plain))
        trainer.train()
    assert ours == pytest.approx(theirs, abs=2e-6)
    assert {p.device.type for p in reference.parameters()} == {"cpu"}


def test_reference_columns_of_the_dataset_are_used(tmp_path: Path) -> None:
    rows = pairs().add_column("ref_chosen_logps", [-1.0] * 8).add_column("ref_rejected_logps", [-2.0] * 8)
    with closing(dpo_trainer(tmp_path / "given", rows=rows, max_steps=1, learning_rate=0.0)) as trainer:
        trainer.train()
        log = step_logs(trainer)[0]
    assert log["rewards/chosen"] == pytest.approx(0.1 * (log["logps/chosen"] + 1.0), abs=1e-4)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "full"])
def test_a_stream_of_pairs_trains_adapters_and_is_refused_for_full_weights(adapted: bool, tmp_path: Path) -> None:
    rows = pairs(12).to_iterable_dataset()
    if not adapted:
        with pytest.raises(UnsupportedError, match=r"stream.*peft_config"):
            dpo_trainer(tmp_path, rows=rows)
        return
    with closing(dpo_trainer(tmp_path, rows=rows, extra={"peft_config": lora()})) as trainer:
        assert trainer.train().global_step == 3


def test_what_cannot_work_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="sync_ref_model"):
        dpo_trainer(tmp_path, sync_ref_model=True)
    with pytest.raises(UnsupportedError, match=r"objective.*generated"):
        dpo_trainer(tmp_path, objective="squad_f1", objective_max_new_tokens=4)
    with pytest.raises(UnsupportedError, match=r"'accuracy' compares with `labels`.*pair of answers"):
        dpo_trainer(tmp_path, objective="accuracy")
    with pytest.raises(ConfigError, match=r"accuracies.*accuracy"):
        dpo_trainer(tmp_path, objective="accuracies")


# -- metrics


def test_metrics_are_those_of_the_plain_trainer_and_counted_once(tmp_path: Path) -> None:
    extra = {"peft_config": lora(), "eval_dataset": pairs(4, start=20)}
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "num_directions": 2}
    with closing(dpo_trainer(tmp_path, extra=extra, learning_rate=0.0, zo_eps=1e-5, **options)) as trainer:
        n_tokens = sum(
            2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
            for row in trainer.train_dataset
        )
        trainer.train()  # an epoch
        logs, history = step_logs(trainer), trainer.state.log_history
    plain = plain_trainer(tmp_path / "plain", small_model(), extra={"peft_config": lora()})
    theirs = plain.evaluate(plain.train_dataset)
    assert logs[-1]["num_tokens"] == n_tokens
    for key in ("rewards/chosen", "rewards/margins", "logps/rejected", "entropy"):
        mean = sum(log[key] for log in logs) / len(logs)
        assert mean == pytest.approx(theirs[f"eval_{key}"], abs=1e-3), key
    assert not any(key.startswith("eval_") for log in logs for key in log)
    evaluated = [log for log in history if "eval_loss" in log]
    assert len(evaluated) == 2
    assert all("eval_rewards/margins" in log and "rewards/margins" not in log for log in evaluated)


def test_compute_metrics_sees_every_pair(tmp_path: Path) -> None:
    def count(predictions: Any) -> dict[str, float]:
        return {"rows": float(len(predictions.label_ids))}

    extra = {"compute_metrics": count, "eval_dataset": pairs(4), "peft_config": lora()}
    with closing(dpo_trainer(tmp_path, extra=extra, **STREAMED_FROM_DISK)) as trainer:
        assert trainer.evaluate()["eval_rows"] == 8  # chosen and rejected


# -- models and checkpoints


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "full"])
def test_crashes_leave_no_trace(adapted: bool, tmp_path: Path) -> None:
    rows = pairs(11)

    def make(folder: Path, **options: Any) -> Any:
        extra = {"eval_dataset": {"a": pairs(2), "b": pairs(3, start=20)}}
        extra |= {"peft_config": lora()} if adapted else {}
        options = {
            "max_steps": 7, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3,
            "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2, "learning_rate": 1e-2, **options,
        }  # fmt: skip
        return dpo_trainer(folder, rows=rows, extra=extra, **options)

    lives = [EVERYTHING_ON_DEVICE, {**STREAMED_FROM_DISK, "write_back_every": "2"}]
    crashes = [Crash("step_end", 2), Crash("evaluate", 4)]
    wanted = straight(make, tmp_path / "straight")
    assert wanted.difference(resumed(make, tmp_path / "crashed", crashes, lives=lives)) == ""


def test_trained_adapters_reload_with_plain_peft(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "start")
    with closing(dpo_trainer(tmp_path / "run", path, extra={"peft_config": lora()}, **STREAMED_FROM_DISK)) as trainer:
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        found = weights_of(trainer.model)
    reloaded = PeftModel.from_pretrained(small_model(), str(tmp_path / "adapter"))
    assert differing(weights_of(reloaded), found) == []


def test_a_model_given_by_path_is_trained_saved_and_reloaded(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "start")
    with closing(dpo_trainer(tmp_path / "run", path, **STREAMED_FROM_DISK)) as trainer:
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        found = weights_of(trainer.model)
    assert differing(weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "final")), found) == []
    assert differing(found, weights_of(small_model())) != []


def test_adapters_that_were_trained_before_are_their_own_reference(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(small_model(), lora())
    with closing(dpo_trainer(tmp_path, model, learning_rate=1e-2, **STREAMED_FROM_DISK)) as trainer:
        before = weights_of(trainer.model)
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
        trainer.train()
        moved = differing(weights_of(trainer.model), before)
    assert moved
    assert all(".default." in name for name in moved)


def test_a_plain_config_and_a_preference_dataset_without_prompts_are_taken(tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"chosen": f"the film was {w} good", "rejected": f"the film was {w} bad"} for w in ("w1", "w2", "w3")]
    )
    config = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_steps=1)
    from zo2trl import ZODPOTrainer

    with (
        pytest.warns(UserWarning, match="ZODPOConfig"),
        closing(
            ZODPOTrainer(small_model(), None, config, train_dataset=rows, processing_class=tiny_tokenizer())
        ) as trainer,
    ):
        assert trainer.train().global_step == 1
