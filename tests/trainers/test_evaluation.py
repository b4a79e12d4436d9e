"""Evaluation, predictions, generation and saved weights see every finished step, and do not change training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback, default_data_collator

from tests.support.covering import every_value
from tests.support.models import N_CLASSES, tiny_batch, tiny_model, tiny_rows
from tests.support.plain import PlainZO
from tests.support.runs import (
    EVERYTHING_ON_DEVICE,
    STREAMED_FROM_CPU,
    STREAMED_FROM_DISK,
    closing,
    differing,
    prompts,
    sft_trainer,
    step_logs,
    weights_of,
    zo_trainer,
)
from zo2trl.checkpoints.export import export_store

# Write-backs never happen by themselves, so current weights on disk come from an explicit flush.
LAZY = {"write_back_every": 1000, "learning_rate": 0.02}
PLACES_BY_NAME = {"device": EVERYTHING_ON_DEVICE, "cpu": STREAMED_FROM_CPU, "disk": STREAMED_FROM_DISK}
PLACES = pytest.mark.parametrize("place", PLACES_BY_NAME.values(), ids=list(PLACES_BY_NAME))


def after_each_step(n_steps: int, name: str = "opt") -> list[dict[str, torch.Tensor]]:
    """Compute the weights of the plain algorithm after 1, 2, ... steps on one and the same batch."""
    model, batch = tiny_model(name), tiny_batch(name)
    algorithm, weights = PlainZO(model), []
    for step in range(n_steps):
        algorithm.step([lambda: model(**batch).loss], step=step, learning_rate=LAZY["learning_rate"])
        weights.append(weights_of(model))
    return weights


def loss_with(weights: dict[str, torch.Tensor], rows: list[dict[str, torch.Tensor]], name: str = "opt") -> float:
    model = tiny_model(name)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        losses = [model(**default_data_collator(rows[i : i + 2])).loss for i in range(0, len(rows), 2)]
    return np.mean(np.repeat(torch.stack(losses).numpy(), 2)).item()


def one_batch(name: str = "opt") -> dict[str, Any]:
    rows, held_out = tiny_rows(name, 2), tiny_rows(name, 6, seed=1)
    return {"rows": rows, "extra": {"data_collator": TrainOnOne(name), "eval_dataset": held_out}}


class TrainOnOne:
    """This trainer uses one batch in every step; evaluation batches (marked by a row's identity) are unchanged."""

    def __init__(self, name: str) -> None:
        self._rows = {row["input_ids"].sum().item() for row in tiny_rows(name, 2)}
        self._batch = tiny_batch(name)

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        is_training = all(row["input_ids"].sum().item() in self._rows for row in rows)
        return dict(self._batch) if is_training else default_data_collator(rows)


@PLACES
def test_evaluation_during_training_is_never_a_step_behind(place: dict, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, **LAZY, **place}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **one_batch(), **options)) as trainer:
        trainer.train()
        found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        expected = [loss_with(weights, trainer.eval_dataset) for weights in after_each_step(4)]
    assert found == expected
    assert len(set(found)) == 4


@PLACES
def test_evaluation_does_not_disturb_training(place: dict, tmp_path: Path) -> None:
    runs = []
    for folder, options in (("a", {}), ("b", {"eval_strategy": "steps", "eval_steps": 1})):
        with closing(
            zo_trainer(tmp_path / folder, tiny_model("opt"), **one_batch(), **LAZY, **place, **options)
        ) as trainer:
            trainer.train()
            runs.append([log["zo/projected_grad"] for log in step_logs(trainer)])
    assert runs[0] == runs[1]


@PLACES
def test_checkpoints_hold_every_step_up_to_their_own(place: dict, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_full_weights": True, **LAZY, **place}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **one_batch(), **options)) as trainer:
        trainer.train()
    for step, expected in enumerate(after_each_step(3), start=1):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert differing(saved, {name: expected[name] for name in saved}) == []


@PLACES
def test_state_dict_and_generation_inside_a_callback_see_the_finished_step(place: dict, tmp_path: Path) -> None:
    prompt = tiny_rows("opt", 1, seed=3)[0]["input_ids"][None]
    seen: list[tuple[dict, torch.Tensor]] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            answer = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
            seen.append(({k: v.clone() for k, v in model.state_dict().items()}, answer))

    run = one_batch()
    run["extra"]["callbacks"] = [Look()]
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **run, **LAZY, **place)) as trainer:
        trainer.train()
    for (weights, answer), expected in zip(seen, after_each_step(3), strict=True):
        assert differing(weights, {name: expected[name] for name in weights}) == []
        model = tiny_model("opt")
        model.load_state_dict(expected)
        assert torch.equal(answer, model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False))


@PLACES
def test_a_forward_of_the_users_own_sees_the_finished_step(place: dict, tmp_path: Path) -> None:
    batch, seen = tiny_batch("opt", seed=3), []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                seen.append(model.eval()(**batch).loss.item())

    run = one_batch()
    run["extra"]["callbacks"] = [Look()]
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **run, **LAZY, **place)) as trainer:
        trainer.train()
    for loss, weights in zip(seen, after_each_step(3), strict=True):
        model = tiny_model("opt")
        model.load_state_dict(weights)
        with torch.no_grad():
            assert loss == model(**batch).loss.item()


@pytest.mark.parametrize(
    ("name", "options"), every_value(["llama", "gemma2", "gpt2", "mixtral", "t5"], [{}, {"num_beams": 3}])
)
def test_generation_from_disk_equals_generation_in_memory(name: str, options: dict, tmp_path: Path) -> None:
    prompt = tiny_batch(name, seed=3)["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    with closing(zo_trainer(tmp_path, tiny_model(name), tiny_rows(name, 6), **STREAMED_FROM_DISK)) as trainer:
        trainer.train()
        model = trainer.model
        streamed = model.generate(prompt, **options)
        trainer.engine.shutdown()
        assert torch.equal(streamed, model.eval().generate(prompt, **options))


@PLACES
def test_save_model_in_the_middle_of_nothing_is_up_to_date(place: dict, tmp_path: Path) -> None:
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **one_batch(), **LAZY, **place)) as trainer:
        trainer.save_model(str(tmp_path / "untrained"))
        trainer.train()
        trainer.save_model(str(tmp_path / "trained"))
    for folder, expected in (("untrained", weights_of(tiny_model("opt"))), ("trained", after_each_step(3)[-1])):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert differing(saved, {name: expected[name] for name in saved}) == []


@pytest.mark.parametrize(
    ("name", "full_weights", "place"), every_value(["opt", "mixtral"], [False, True], PLACES_BY_NAME.values())
)
def test_the_best_model_is_loaded_at_the_end(name: str, full_weights: bool, place: dict, tmp_path: Path) -> None:
    options = {
        "save_full_weights": full_weights,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4,
        "load_best_model_at_end": True, "learning_rate": 0.05, "write_back_every": 1000,
    }  # fmt: skip
    with closing(zo_trainer(tmp_path, tiny_model(name), **one_batch(name), **options, **place)) as trainer:
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        best = 1 + int(np.argmin(losses))
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
        assert trainer.evaluate()["eval_loss"] == min(losses)
        loaded = weights_of(trainer.model)
        model_class = type(trainer.model)
    export_store(tmp_path / "store", tmp_path / "best", step=best)
    assert differing(loaded, weights_of(model_class.from_pretrained(tmp_path / "best"))) == []
    if full_weights:
        assert differing(loaded, weights_of(model_class.from_pretrained(tmp_path / f"checkpoint-{best}"))) == []
    assert best < 4, "the last model is the best one, so this run shows nothing: choose another learning rate"


@PLACES
def test_the_best_adapter_is_loaded_at_the_end(place: dict, tmp_path: Path) -> None:
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4,
        "load_best_model_at_end": True, "learning_rate": 0.3, "write_back_every": 1000, "seed": 3,
    }  # fmt: skip
    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    extra["eval_dataset"] = prompts(4, start=50)
    with closing(sft_trainer(tmp_path, tiny_model("opt"), extra=extra, **options, **place)) as trainer:
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert losses.index(min(losses)) < 3, "the last adapter is the best one, so this run shows nothing"
        assert trainer.evaluate()["eval_loss"] == min(losses)


@PLACES
def test_metrics_see_the_logits_of_the_plain_model(place: dict, tmp_path: Path) -> None:
    rows = tiny_rows("roberta-classes", 7, seed=1)  # the last batch is short

    def accuracy(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (7, N_CLASSES)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    extra = {"compute_metrics": accuracy, "eval_dataset": rows}
    name = "roberta-classes"
    with closing(zo_trainer(tmp_path, tiny_model(name), tiny_rows(name, 6), extra=extra, **place)) as trainer:
        trainer.train()
        metrics, predicted = trainer.evaluate(), trainer.predict(rows)
        model = trainer.model
        trainer.engine.shutdown()
    inputs = default_data_collator(rows)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    assert np.allclose(predicted.predictions, logits.numpy(), atol=1e-6)
    assert predicted.label_ids.tolist() == inputs["labels"].tolist()
    assert metrics["eval_accuracy"] == predicted.metrics["test_accuracy"]
    assert metrics["eval_accuracy"] == (logits.argmax(-1) == inputs["labels"]).double().mean().item()


def test_logits_can_be_reduced_before_they_are_kept(tmp_path: Path) -> None:
    extra = {
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "compute_metrics": lambda prediction: {"shape": len(prediction.predictions.shape)},
        "eval_dataset": tiny_rows("opt", 5, seed=1),
    }
    with closing(
        zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 4), extra=extra, **STREAMED_FROM_DISK)
    ) as trainer:
        assert trainer.evaluate()["eval_shape"] == 2


def test_several_evaluation_sets_are_reported_by_name(tmp_path: Path) -> None:
    sets = {"near": tiny_rows("opt", 3, seed=1), "far": tiny_rows("opt", 5, seed=2)}
    with closing(
        zo_trainer(
            tmp_path, tiny_model("opt"), tiny_rows("opt", 4), extra={"eval_dataset": sets}, **STREAMED_FROM_DISK
        )
    ) as trainer:
        metrics = trainer.evaluate()
    assert {"eval_near_loss", "eval_far_loss"} <= metrics.keys()


def test_evaluation_before_any_training_sees_the_model_as_it_came(tmp_path: Path) -> None:
    run = one_batch()
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **run, **STREAMED_FROM_DISK)) as trainer:
        found = trainer.evaluate()["eval_loss"]
        assert found == loss_with(weights_of(tiny_model("opt")), trainer.eval_dataset)


def test_several_batches_share_one_visit_of_the_blocks_on_disk(tmp_path: Path) -> None:
    rows, read = tiny_rows("opt", 16, seed=1), []
    with closing(zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 4), **STREAMED_FROM_DISK)) as trainer:
        for n_rows in (2, 16):
            trainer.evaluate(rows[:2])  # prefetches for the next traversal are counted with this one
            before = trainer.engine.store.traffic["disk_read"]
            trainer.evaluate(rows[:n_rows])
            read.append(trainer.engine.store.traffic["disk_read"] - before)
    assert read[1] <= 2 * read[0]  # 1 batch, 8 batches


def test_weights_loaded_into_the_model_by_the_user_are_trained_on(tmp_path: Path) -> None:
    other = weights_of(tiny_model("opt", seed=5))
    run = one_batch()
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **run, **STREAMED_FROM_DISK)) as trainer:
        trainer.train()
        trainer.model.load_state_dict(other)
        assert trainer.evaluate()["eval_loss"] == loss_with(other, trainer.eval_dataset)
        assert differing(weights_of(trainer.model), other) == []
