"""A trained model can be used, saved and changed while its trainer still exists."""

import copy
import gc
import io
import logging
import pickle
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from tests.support.models import tiny_batch, tiny_model, tiny_rows
from tests.support.runs import (
    STREAMED_FROM_CPU,
    STREAMED_FROM_DISK,
    closing,
    differing,
    prompts,
    sft_trainer,
    weights_of,
    zo_trainer,
)
from tests.support.tokenizer import tiny_tokenizer
from zo2trl import ZOSFTTrainer
from zo2trl.errors import StoreError, TraversalError

STREAMED = {"cpu": STREAMED_FROM_CPU, "disk": STREAMED_FROM_DISK}
everywhere = pytest.mark.parametrize("where", STREAMED.values(), ids=STREAMED)


def trained(folder: Path, where: dict[str, Any], **options: Any) -> Any:
    trainer = zo_trainer(folder, tiny_model("llama"), tiny_rows("llama", 6), **where, **options)
    trainer.train()
    return trainer


@torch.no_grad()
def loss_of(model: Any) -> float:
    return model(**tiny_batch("llama")).loss.item()


@everywhere
def test_a_deep_copy_is_an_ordinary_model_of_its_own(where: dict, tmp_path: Path) -> None:
    with closing(trained(tmp_path, where)) as trainer:
        twin = copy.deepcopy(trainer.model)
        assert loss_of(twin) == loss_of(trainer.model)
        with torch.no_grad():
            for parameter in twin.model.layers.parameters():
                parameter.zero_()
        assert loss_of(twin) != loss_of(trainer.model)
        twin(**tiny_batch("llama")).loss.backward()
        assert all(p.grad is not None for p in twin.parameters())


@everywhere
def test_the_model_can_be_pickled(where: dict, tmp_path: Path) -> None:
    with closing(trained(tmp_path, where)) as trainer:
        file = io.BytesIO(pickle.dumps(trainer.model))
        assert loss_of(pickle.load(file)) == loss_of(trainer.model)


@everywhere
def test_a_backward_pass_through_streamed_weights_is_refused(where: dict, tmp_path: Path) -> None:
    with closing(trained(tmp_path, where)) as trainer:
        loss = trainer.model(**tiny_batch("llama")).loss
        with pytest.raises(TraversalError, match="backward pass"):
            loss.backward()
        trainer.close()
        trainer.model(**tiny_batch("llama")).loss.backward()


@everywhere
@pytest.mark.parametrize("change", ["in place", "new tensor"])
def test_weights_changed_by_hand_count_at_once(change: str, where: dict, tmp_path: Path) -> None:
    with closing(trained(tmp_path, where)) as trainer:
        plain = copy.deepcopy(trainer.model)
        for model in (plain, trainer.model):
            for parameter in model.model.layers.parameters():
                if change == "in place":
                    parameter.data.mul_(0.5)  # does not count up the parameter's version
                else:
                    parameter.data = parameter.data * 0.5
        assert loss_of(trainer.model) == loss_of(plain)
        trainer.save_model(str(tmp_path / "saved"))
        assert loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == loss_of(plain)


@everywhere
def test_changing_weights_between_steps_that_are_pending_is_refused(where: dict, tmp_path: Path) -> None:
    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.mul_(2.0)

    extra = {"callbacks": [Meddler()]}
    trainer = zo_trainer(tmp_path, tiny_model("llama"), tiny_rows("llama", 6), extra=extra, **where)
    with closing(trainer), pytest.raises(TraversalError, match=r"layers.1.mlp.up_proj.weight.*flush"):
        trainer.train()


@everywhere
@pytest.mark.parametrize("safe", [True, False])
def test_merged_adapters_are_in_the_weights_that_run_and_that_are_saved(
    safe: bool, where: dict, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with closing(sft_trainer(tmp_path, tiny_model("llama"), extra={"peft_config": config}, **where)) as trainer:
        trainer.train()
        wanted = loss_of(trainer.model)
        merged = trainer.model.merge_and_unload(safe_merge=safe)
        assert loss_of(merged) == pytest.approx(wanted, abs=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        assert loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == pytest.approx(wanted, abs=1e-5)


@everywhere
def test_converting_a_managed_model_says_to_close_first(where: dict, tmp_path: Path) -> None:
    with closing(trained(tmp_path, where)) as trainer:
        trainer.model.to(torch.float64)
        with pytest.raises(TraversalError, match=r"trainer\.close\(\)"):
            loss_of(trainer.model)
        trainer.model.to(torch.float32)
        loss_of(trainer.model)


@everywhere
def test_a_second_trainer_may_take_over_the_same_model(where: dict, tmp_path: Path) -> None:
    with closing(trained(tmp_path / "one", where)) as first:
        after_one = weights_of(first.model)
        second = zo_trainer(tmp_path / "two", first.model, tiny_rows("llama", 6), **where)
        with closing(second):
            second.train()
            assert any(not torch.equal(after_one[name], p) for name, p in second.model.named_parameters())


def test_a_skipped_step_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    def loss(outputs, labels, num_items_in_batch=None):
        loss.calls += 1
        value = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return value * (float("nan") if loss.calls == 1 else 1.0)

    loss.calls = 0
    extra = {"compute_loss_func": loss}
    with closing(zo_trainer(tmp_path, tiny_model("llama"), tiny_rows("llama", 6), extra=extra)) as trainer:
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert "Step 0 is skipped" in caplog.text


@everywhere
def test_after_ctrl_c_the_parameters_show_every_finished_step(where: dict, tmp_path: Path) -> None:
    class Impatient(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    extra = {"callbacks": [Impatient()]}
    trainer = zo_trainer(tmp_path / "cut", tiny_model("llama"), tiny_rows("llama", 6), extra=extra, **where)
    with closing(trainer):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        shown = weights_of(trainer.model)
        kept = {name: value.clone() for name, value in trainer.model.state_dict().items() if name in shown}
        assert [name for name in shown if not torch.equal(shown[name], kept[name])] == []
        trainer.callback_handler.remove_callback(Impatient)
        trainer.train()


@everywhere
def test_resuming_in_the_same_trainer_is_resuming_in_a_new_one(where: dict, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **where}
    with closing(zo_trainer(tmp_path, tiny_model("llama"), tiny_rows("llama", 6), **options)) as trainer:
        trainer.train()
        straight = weights_of(trainer.model)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        again = weights_of(trainer.model)
    assert [name for name in straight if not torch.equal(straight[name], again[name])] == []


def test_plain_training_arguments_are_enough_for_the_sft_trainer(tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = ZOSFTTrainer(tiny_model("opt"), args, train_dataset=prompts(), processing_class=tiny_tokenizer())
    with closing(trainer):
        trainer.train()
        assert trainer.state.global_step == 2


@everywhere
def test_layers_frozen_between_two_calls_of_train_stay_where_they_are(where: dict, tmp_path: Path) -> None:
    with closing(trained(tmp_path, where)) as trainer:
        trainer.model.model.layers[0].requires_grad_(False)
        before = weights_of(trainer.model)
        trainer.train()
        after = weights_of(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("model.layers.0.") for name in moved)


@everywhere
@pytest.mark.parametrize("convert", [torch.nn.Module.half, lambda model: model.to(torch.bfloat16)], ids=["half", "to"])
def test_closing_after_a_conversion_leaves_an_ordinary_model_with_the_trained_weights(
    convert: Callable, where: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(trained(tmp_path, where)) as trainer:
        model, wanted, kept = trainer.model, weights_of(trainer.model), loss_of(trainer.model)
        store = trainer.engine.store
        convert(model)
        trainer.close()
    assert "model.embed_tokens.weight and" in caplog.text and "Convert the model now" in caplog.text
    assert not store.is_open and not [module for module in model.modules() if "forward" in module.__dict__]
    assert differing(weights_of(model), wanted) == [] and loss_of(model) == kept
    convert(model)
    assert not torch.isnan(model(**tiny_batch("llama")).logits).any()


@everywhere
def test_closing_after_resizing_embeddings_leaves_an_ordinary_model_of_the_new_size(
    where: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(trained(tmp_path, where)) as trainer:
        model, wanted = trainer.model, weights_of(trainer.model)
        rows = len(wanted["model.embed_tokens.weight"])
        model.resize_token_embeddings(rows + 5)
        trainer.close()
    assert "model.embed_tokens.weight as resized" in caplog.text
    found = weights_of(model)
    assert len(found["model.embed_tokens.weight"]) == len(found["lm_head.weight"]) == rows + 5
    assert differing({name: found[name][: len(value)] for name, value in wanted.items()}, wanted) == []
    loss_of(model)
    model.save_pretrained(tmp_path / "saved")
    assert differing(weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), found) == []


# -- a model given as a path, with another dtype than the checkpoint's, before anything was trained


def cast_trainer(folder: Path, where: dict[str, Any], *, to: torch.dtype, **extra: Any) -> Any:
    stored = torch.float32 if to == torch.bfloat16 else torch.bfloat16
    tiny_model("llama", dtype=stored).save_pretrained(folder / "base")
    base, options = str(folder / "base"), {"model_init_kwargs": {"dtype": to}, **where}
    return sft_trainer(folder / "run", base, extra=extra, **options)


def reloaded(folder: Path, save: Callable[[Path], Any]) -> Any:
    save(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


USES: dict[str, Callable[[Any, Path], Any]] = {
    "forward": lambda trainer, _: loss_of(trainer.model),
    "generate": lambda trainer, _: trainer.model.generate(tiny_batch("llama")["input_ids"], max_new_tokens=2),
    "state_dict": lambda trainer, _: trainer.model.state_dict(),
    "save_model": lambda trainer, to: reloaded(to, lambda folder: trainer.save_model(str(folder))),
    "save_pretrained": lambda trainer, to: reloaded(to, trainer.model.save_pretrained),
    "deepcopy": lambda trainer, _: copy.deepcopy(trainer.model),
    "pickle": lambda trainer, _: pickle.loads(pickle.dumps(trainer.model)),
}


@pytest.mark.parametrize(
    ("to", "where"),
    [(torch.float32, STREAMED_FROM_CPU), (torch.bfloat16, STREAMED_FROM_DISK)],
    ids=["wider", "narrower"],
)
@pytest.mark.parametrize("use", USES)
def test_a_path_loaded_in_another_dtype_can_be_used_before_training(
    use: str, to: torch.dtype, where: dict, tmp_path: Path
) -> None:
    with closing(cast_trainer(tmp_path, where, to=to)) as trainer:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=to)
        with torch.inference_mode():
            found = USES[use](trainer, tmp_path / "saved")
        if isinstance(found, dict):
            found = {name: value for name, value in found.items() if name in weights_of(plain)}
            assert differing(found, weights_of(plain)) == []
        elif isinstance(found, torch.nn.Module):
            assert differing(weights_of(found), weights_of(plain)) == []
            assert found.config.dtype == to
        assert differing(weights_of(trainer.model), weights_of(plain)) == []
        assert loss_of(trainer.model) == loss_of(plain)
        left = [name for module in trainer.model.modules() for name in ("generate", "__reduce_ex__")
                if name in module.__dict__]  # fmt: skip
        assert left == []
        if use == "forward":
            trainer.train()
            assert differing(weights_of(trainer.model), weights_of(plain)) != []


def test_adapters_on_a_path_loaded_in_another_dtype_can_be_merged_before_training(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with closing(cast_trainer(tmp_path, STREAMED_FROM_CPU, to=torch.float32, peft_config=config)) as trainer:
        merged = trainer.model.merge_and_unload()
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}


def test_a_model_that_waits_for_its_dtype_does_not_keep_its_trainer_alive(tmp_path: Path) -> None:
    trainer = cast_trainer(tmp_path, STREAMED_FROM_CPU, to=torch.float32)
    model, alive = trainer.model, weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None
    copy.deepcopy(model)


def test_a_store_that_cannot_be_opened_is_told_at_every_use_of_a_model_that_waits(tmp_path: Path) -> None:
    with closing(cast_trainer(tmp_path, STREAMED_FROM_CPU, to=torch.float32)) as trainer:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "store").write_text("a file")
        for _ in range(2):
            with pytest.raises(StoreError, match="store"):
                loss_of(trainer.model)
        (tmp_path / "run" / "store").unlink()
        loss_of(trainer.model)


def test_closing_leaves_nothing_on_the_model(tmp_path: Path) -> None:
    model = tiny_model("roberta-classes", dtype=torch.bfloat16)
    trainer = zo_trainer(tmp_path, model, tiny_rows("roberta-classes", 6))
    trainer.train()
    trainer.close()
    assert not hasattr(model, "_is_accelerate_prepared")
    assert model(**tiny_batch("roberta-classes")).logits.dtype == torch.bfloat16
    assert not [module for module in model.modules() if "forward" in module.__dict__]
