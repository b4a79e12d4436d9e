"""Logs have every promised key, with means since the last log, and count each token once."""

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from tests.support.models import tiny_model, tiny_rows
from tests.support.runs import (
    EVERYTHING_ON_DEVICE,
    STREAMED_FROM_CPU,
    STREAMED_FROM_DISK,
    closing,
    prompts,
    sft_trainer,
    step_logs,
    zo_trainer,
)
from tests.support.tokenizer import tiny_tokenizer

KEYS = {
    "loss", "grad_norm", "learning_rate", "epoch", "zo/projected_grad", "zo/loss_plus", "zo/loss_minus",
    "zo/tokens_per_second", "zo/bytes_h2d", "zo/bytes_d2h", "zo/bytes_disk_read", "zo/bytes_disk_written",
}  # fmt: skip


def test_training_logs_have_every_promised_key(tmp_path: Path) -> None:
    with closing(zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 6))) as trainer:
        trainer.train()
        logs = step_logs(trainer)
    assert len(logs) == 3
    for log in logs:
        assert log.keys() >= KEYS
        assert log["loss"] == pytest.approx((log["zo/loss_plus"] + log["zo/loss_minus"]) / 2, abs=1e-6)
        assert log["grad_norm"] == pytest.approx(abs(log["zo/projected_grad"]))
        assert log["zo/projected_grad"] == pytest.approx((log["zo/loss_plus"] - log["zo/loss_minus"]) / 2e-3)
        assert log["zo/tokens_per_second"] > 0


def test_callbacks_and_reporters_get_the_same_keys(tmp_path: Path) -> None:
    seen: list[dict] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: object, state: object, control: object, logs: dict, **kwargs: object) -> None:
            seen.append(dict(logs))

    with closing(
        zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 6), extra={"callbacks": [Reporter()]})
    ) as trainer:
        trainer.train()
    assert seen[0].keys() >= KEYS
    assert "zo/projected_grad" not in seen[-1]  # the summary of the run is no step


def test_a_log_shows_means_since_the_last_one(tmp_path: Path) -> None:
    by_interval = {}
    for every in (1, 2):
        options = {"logging_steps": every, "max_steps": 4}
        with closing(zo_trainer(tmp_path / str(every), tiny_model("opt"), tiny_rows("opt", 8), **options)) as trainer:
            trainer.train()
            by_interval[every] = step_logs(trainer)
    single, double = by_interval[1], by_interval[2]
    for i, log in enumerate(double):
        for key in ("loss", "zo/projected_grad", "zo/loss_plus", "zo/loss_minus"):
            mean = (single[2 * i][key] + single[2 * i + 1][key]) / 2
            assert log[key] == pytest.approx(mean, abs=1e-5)


def test_bytes_moved_are_those_of_the_tier(tmp_path: Path) -> None:
    logs = {}
    for name, place in (("gpu", EVERYTHING_ON_DEVICE), ("cpu", STREAMED_FROM_CPU), ("disk", STREAMED_FROM_DISK)):
        options = {**place, "granularity": "block", "max_steps": 4, "write_back_every": 1}
        with closing(zo_trainer(tmp_path / name, tiny_model("opt"), tiny_rows("opt", 8), **options)) as trainer:
            trainer.train()
            logs[name] = step_logs(trainer)[-1]
            blocks = sum(size for unit, _, size in trainer.engine.store.describe() if unit != "root")
    links = ("zo/bytes_h2d", "zo/bytes_d2h", "zo/bytes_disk_read", "zo/bytes_disk_written")
    assert [logs["gpu"][link] for link in links] == [0, 0, 0, 0]
    assert logs["cpu"]["zo/bytes_h2d"] == pytest.approx(blocks, rel=0.5)
    assert [logs["cpu"][link] for link in links[2:]] == [0, 0]
    assert logs["disk"]["zo/bytes_disk_read"] == pytest.approx(blocks, rel=0.5)
    assert logs["disk"]["zo/bytes_disk_written"] == pytest.approx(blocks, rel=0.5)


def test_one_step_fetches_a_block_once_however_many_micro_batches_it_has(tmp_path: Path) -> None:
    read = []
    for n_steps in (1, 8):
        options = {"gradient_accumulation_steps": n_steps, "per_device_train_batch_size": 1, "max_steps": 4}
        options |= {**STREAMED_FROM_DISK, "granularity": "block", "num_directions": 2}
        with closing(
            zo_trainer(tmp_path / str(n_steps), tiny_model("opt"), tiny_rows("opt", 32), **options)
        ) as trainer:
            trainer.train()
            read.append(step_logs(trainer)[-1]["zo/bytes_disk_read"])
    assert read[0] == read[1]


@pytest.mark.parametrize("num_directions", [1, 2])
def test_tokens_are_counted_once_not_once_per_probe(num_directions: int, tmp_path: Path) -> None:
    options = {"max_steps": 2, "num_directions": num_directions, "gradient_accumulation_steps": 2}
    with closing(sft_trainer(tmp_path, tiny_model("opt"), prompts(8), **options)) as trainer:
        tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
        trainer.train()  # 2 steps of 2 micro-batches of 2: every row once
        logs = step_logs(trainer)
    assert logs[-1]["num_tokens"] == tokens
    assert logs[0]["num_tokens"] < tokens


@pytest.mark.parametrize("options", [{"num_directions": 2}, {"gradient_accumulation_steps": 2}], ids=str)
def test_tokens_are_counted_with_an_objective_too(options: dict, tmp_path: Path) -> None:
    counts = []
    for name, objective in (("loss", None), ("objective", "accuracy")):
        named = {"max_steps": 2, "objective": objective, "eval_strategy": "steps", "eval_steps": 2, **options}
        extra = {"eval_dataset": prompts(2)}
        with closing(sft_trainer(tmp_path / name, tiny_model("opt"), prompts(8), extra=extra, **named)) as trainer:
            trainer.train()
            history = trainer.state.log_history
        found = [entry[key] for entry in history for key in ("num_tokens", "eval_num_tokens") if key in entry]
        counts.append(found)
    assert len(counts[0]) == 3
    assert counts[1] == counts[0]
    assert counts[0][-1] > 0


def test_speed_is_left_out_where_nothing_is_counted_in_tokens(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    rows = [{"pixel_values": torch.full((3, 8, 8), i / 4), "labels": i % 3} for i in range(4)]
    with closing(zo_trainer(tmp_path, model, rows)) as trainer:
        trainer.train()
        logs = step_logs(trainer)
    assert len(logs) == 3
    assert all(log.keys() >= KEYS - {"zo/tokens_per_second"} for log in logs)
    assert not any("zo/tokens_per_second" in log for log in logs)


def test_metrics_of_training_and_evaluation_are_not_mixed(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    extra = {"eval_dataset": prompts(4, start=50)}
    with closing(sft_trainer(tmp_path, tiny_model("opt"), prompts(8), extra=extra, **options)) as trainer:
        trainer.train()
        history = trainer.state.log_history
    train = [log for log in history if "zo/projected_grad" in log]
    evaluated = [log for log in history if "eval_loss" in log]
    assert all({"entropy", "mean_token_accuracy", "num_tokens"} <= log.keys() for log in train)
    assert not any(key.startswith("eval_") for log in train for key in log)
    assert all({"eval_entropy", "eval_mean_token_accuracy"} <= log.keys() for log in evaluated)
    counts = [log["num_tokens"] for log in train]
    assert counts == sorted(counts)


def test_accuracy_and_entropy_of_training_are_those_of_the_plain_trainer(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    with closing(sft_trainer(tmp_path / "zo", tiny_model("opt"), max_steps=1, zo_eps=1e-5)) as trainer:
        trainer.train()
        ours = step_logs(trainer)[0]
    model = tiny_model("opt")
    model.config.dropout = 0.0
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    config = SFTConfig(
        output_dir=str(tmp_path / "plain"), max_steps=1, max_length=32, logging_steps=1, report_to="none", bf16=False,
        use_cpu=True, per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, learning_rate=0.0,
    )  # fmt: skip
    plain = SFTTrainer(model=model, args=config, train_dataset=prompts(), processing_class=tiny_tokenizer())
    plain.train()
    theirs = plain.state.log_history[0]
    assert ours["num_tokens"] == theirs["num_tokens"]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=1e-3)
    assert ours["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"], abs=1e-3)
