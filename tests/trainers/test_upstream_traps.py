"""A forward-only trainer on top of transformers, TRL and accelerate avoids their traps, most of which are silent.

Each test is one such trap. Others are tested with their module: autocast's cache of weights
(test_sft_trainer.py), tokens counted per probe (test_metrics.py), optimizers that never see a gradient
(test_refusals.py), uploads of the store (test_hub_upload.py), adapters of quantised bases (test_peft_quantised.py).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import OPTConfig, OPTForSequenceClassification, Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

from tests.support.models import N_CLASSES, SPECIAL, VOCABULARY, tiny_model, tiny_rows
from tests.support.runs import (
    QUIET,
    STREAMED_FROM_DISK,
    closing,
    differing,
    prompts,
    sft_trainer,
    step_logs,
    weights_of,
    zo_trainer,
)
from tests.support.tokenizer import tiny_tokenizer
from tests.support.trainings import small_model
from zo2trl import ZOConfig, ZOSFTConfig, ZOSFTTrainer, ZOTrainer


def classifier() -> nn.Module:
    """Make a decoder with a classification head, as in MeZO's SST-2 recipes."""
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
    config = OPTConfig(**sizes, **SPECIAL, **words, num_labels=N_CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OPTForSequenceClassification(config).eval()


# -- losses


@pytest.mark.parametrize("make", [classifier, partial(tiny_model, "roberta-classes")], ids=["decoder", "encoder"])
def test_a_classification_loss_is_not_multiplied_by_the_accumulation_steps(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    # Upstream assumes that every model that accepts keyword arguments divides by `num_items_in_batch`.
    losses, grads = {}, {}
    for n_steps in (1, 2, 4):
        options = {"per_device_train_batch_size": 8 // n_steps, "gradient_accumulation_steps": n_steps, "max_steps": 1}
        rows = tiny_rows("roberta-classes", 8)
        with closing(zo_trainer(tmp_path / str(n_steps), make(), rows, **options, **STREAMED_FROM_DISK)) as trainer:
            trainer.train()
            (log,) = step_logs(trainer)
        losses[n_steps], grads[n_steps] = log["loss"], log["zo/projected_grad"]
    assert losses[2] == pytest.approx(losses[1], abs=1e-6)
    assert losses[4] == pytest.approx(losses[1], abs=1e-6)
    assert grads[4] == pytest.approx(grads[1], abs=2e-3)


def test_probes_see_the_head_that_trl_never_calls(tmp_path: Path) -> None:
    # TRL reads `lm_head.weight` inside a patched forward: a hook on the head itself would never fire.
    model = small_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    with closing(sft_trainer(tmp_path, model, **STREAMED_FROM_DISK)) as trainer:
        before = weights_of(trainer.model)
        trainer.train()
        assert all(abs(log["zo/projected_grad"]) > 1e-3 for log in step_logs(trainer))
        assert differing(weights_of(trainer.model), before) == ["lm_head.weight"]


# -- modes and metrics


def test_probes_run_in_eval_mode_and_their_metrics_are_those_of_training(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Looking(ZOSFTTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((model.training, any(m.training for m in model.modules() if m is not model)))
            return super().compute_loss(model, *args, **kwargs)

    config = ZOSFTConfig(**QUIET, output_dir=str(tmp_path), max_length=32)
    trainer = Looking(tiny_model("opt"), config, train_dataset=prompts(), processing_class=tiny_tokenizer())
    with closing(trainer):
        trainer.train()
    assert set(seen) == {(True, False)}  # the root's mode names the metrics; dropout is off
    assert all({"entropy", "mean_token_accuracy"} <= set(log) for log in step_logs(trainer))
    assert not any(name.startswith("eval") for log in trainer.state.log_history for name in log)


def test_tokens_are_counted_as_trl_counts_them_whatever_the_number_of_probes(tmp_path: Path) -> None:
    config = SFTConfig(**{**QUIET, "output_dir": str(tmp_path / "trl"), "learning_rate": 0.0, "max_length": 32})
    plain = SFTTrainer(small_model(), config, train_dataset=prompts(), processing_class=tiny_tokenizer())
    plain.train()
    expected = [log["num_tokens"] for log in plain.state.log_history if "num_tokens" in log]
    options = {"num_directions": 3, "gradient_accumulation_steps": 1}
    with closing(sft_trainer(tmp_path / "zo", small_model(), **options)) as trainer:
        trainer.train()
        assert [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log] == expected


# -- configs and models


def test_a_plain_configs_tokens_are_not_redacted_on_the_way(tmp_path: Path) -> None:
    # `SFTConfig.to_dict()` writes "<EOS_TOKEN>" for every field that ends in `_token`.
    config = SFTConfig(**{**QUIET, "output_dir": str(tmp_path), "eos_token": "w3", "hub_token": "secret"})
    trainer = ZOSFTTrainer(small_model(), config, train_dataset=prompts(), processing_class=tiny_tokenizer())
    with closing(trainer):
        assert (trainer.args.eos_token, trainer.args.hub_token) == ("w3", "secret")
        assert trainer.processing_class.eos_token == "w3"


def test_a_model_given_as_a_path_is_neither_widened_nor_placed(tmp_path: Path) -> None:
    # TRL would load it in float32 with `device_map="auto"` before a subclass sees it.
    small_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "start")
    with closing(sft_trainer(tmp_path / "run", str(tmp_path / "start"))) as trainer:
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
        assert getattr(trainer.model, "hf_device_map", None) is None


def test_a_plain_configs_gradient_checkpointing_does_not_make_adapters_hook_the_embeddings(tmp_path: Path) -> None:
    # TRL turns it on by default, and then requests gradients of the inputs from PEFT.
    config = SFTConfig(**{**QUIET, "output_dir": str(tmp_path), "max_length": 32})
    assert config.gradient_checkpointing
    named = {"train_dataset": prompts(), "processing_class": tiny_tokenizer(), "peft_config": LoraConfig(r=2)}
    with closing(ZOSFTTrainer(small_model(), config, **named)) as trainer:
        embeddings = trainer.model.get_input_embeddings()
        assert not embeddings._forward_hooks
        assert not trainer.model.is_gradient_checkpointing


def test_several_visible_gpus_do_not_become_data_parallelism_in_one_process(tmp_path: Path) -> None:
    config = ZOConfig(**QUIET, output_dir=str(tmp_path))
    config._n_gpu = 4  # upstream would wrap the model, and multiply the batch size
    rows = tiny_rows("opt", 8)
    with closing(ZOTrainer(small_model(), config, default_data_collator, rows)) as trainer:
        assert trainer.args.n_gpu == 1
        assert trainer.args.train_batch_size == QUIET["per_device_train_batch_size"]
        trainer.train()


def test_the_model_is_neither_wrapped_nor_moved_nor_compiled_by_accelerate(tmp_path: Path) -> None:
    model = small_model()
    places: list[int] = []
    with closing(zo_trainer(tmp_path, model, tiny_rows("opt", 8), **STREAMED_FROM_DISK)) as trainer:
        trainer.create_optimizer()
        trainer.train()
        assert trainer.model_wrapped is trainer.model is model
        assert trainer.accelerator.unwrap_model(model) is model
        places += [p.data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)


def test_a_model_made_by_model_init_is_the_one_that_trains(tmp_path: Path) -> None:
    # `train()` makes the model again, so the store of the earlier one is not the trained one.
    config = ZOConfig(**QUIET, output_dir=str(tmp_path), **STREAMED_FROM_DISK)
    named = {"data_collator": default_data_collator, "train_dataset": tiny_rows("opt", 8)}
    trainer = ZOTrainer(args=config, model_init=lambda: small_model(), **named)
    with closing(trainer):
        trainer.train()
        assert differing(weights_of(trainer.model), weights_of(small_model())) != []
        assert trainer.engine.model is trainer.model


def test_work_is_reported_as_two_forwards_and_no_backward(tmp_path: Path) -> None:
    rows = tiny_rows("opt", 8)
    arguments = TrainingArguments(output_dir=str(tmp_path / "plain"), use_cpu=True, report_to="none")
    plain = Trainer(small_model(), arguments, default_data_collator, rows)
    inputs = default_data_collator(rows)
    with closing(zo_trainer(tmp_path, small_model(), rows, num_directions=3)) as trainer:
        assert trainer.floating_point_ops(inputs) == plain.floating_point_ops(inputs) * 2 * 3 // 3


# -- checkpoints


@pytest.mark.parametrize("keeps_store", [True, False], ids=["from the journal", "from the weights of a checkpoint"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_resuming_brings_fused_experts_back(name: str, keeps_store: bool, tmp_path: Path) -> None:
    # Upstream saves them expert by expert, and loads the checkpoint with `strict=False`: experts are not restored.
    options = {"save_strategy": "steps", "save_steps": 2, "save_full_weights": True, "learning_rate": 1e-2}

    def trained(folder: Path, n_steps: int, **more: Any) -> dict[str, torch.Tensor]:
        rows = tiny_rows(name, 12)
        with closing(zo_trainer(folder, tiny_model(name), rows, max_steps=n_steps, **options)) as trainer:
            trainer.train(**more)
            return weights_of(trainer.model)

    halfway, at_first = trained(tmp_path / "run", 2), weights_of(tiny_model(name))
    experts = {name for name in halfway if ".experts." in name}
    assert experts
    assert experts <= set(differing(halfway, at_first))
    if not keeps_store:
        (tmp_path / "run" / "store").rename(tmp_path / "gone")
    resumed = trained(tmp_path / "run", 4, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert differing(resumed, trained(tmp_path / "whole", 4)) == []
