"""ZOSFTTrainer has every feature of TRL's SFTTrainer: scripts change only the two class names.

Each row trains twice on the CPU: with TRL's own classes at learning rate 0, and with ours. The first step of both is
on the same weights and the same batches, so the losses and TRL's metrics must be the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, EvalPrediction
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from tests.support.formats import (
    GENERATION_TAGGED,
    chat_prompts,
    chat_tokenizer,
    chats,
    sharegpt_chats,
    texts,
    tokenised,
    tool_calls,
    untagged_template,
)
from tests.support.models import tiny_model
from tests.support.runs import QUIET, STREAMED_FROM_DISK, closing, differing, prompts, step_logs, weights_of
from tests.support.tokenizer import tiny_tokenizer
from tests.support.trainings import small_model
from zo2trl import ZOSFTConfig, ZOSFTTrainer
from zo2trl.cli import main as run_command

ZO_EPS = 1e-5  # small enough for the mean of both probes' losses to be the loss
N_STEPS = 2


@dataclass(frozen=True, eq=False)
class Script:
    """This is what a user's script contains besides the names of the two classes."""

    rows: Callable[[], Any] = prompts
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], Any] = tiny_tokenizer
    model: Callable[[], Any] = small_model
    extra: dict[str, Any] = field(default_factory=dict)

    def trainer(self, folder: Path, *, trainer_class: Any, config_class: Any, **options: Any) -> Any:
        """Make the trainer of the script; the last block and one norm are frozen."""
        model = self.model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1" not in name and name != "model.norm.weight")
        named = {**QUIET, "output_dir": str(folder), "max_length": 32, "max_steps": N_STEPS, **self.options, **options}
        trainer = trainer_class(
            model=model, args=config_class(**named), train_dataset=self.rows(), processing_class=self.tokenizer(),
            **self.extra,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return trainer


chatting = partial(Script, tokenizer=chat_tokenizer, rows=chats)
untagged = partial(chat_tokenizer, untagged_template())

SCRIPTS: dict[str, Script] = {
    # -- dataset formats
    "text": Script(texts),
    "text in another column": Script(partial(texts, column="said"), {"dataset_text_field": "said"}),
    "prompt and completion": Script(),
    "conversations": chatting(),
    "conversations in ShareGPT's words": chatting(rows=sharegpt_chats),
    "conversational prompt and completion": chatting(rows=chat_prompts),
    "tool calls": Script(tool_calls, {"max_length": 128}, tokenizer=untagged),
    "tokenised": Script(tokenised),
    "tokenised with labels": Script(partial(tokenised, extra="labels")),
    "tokenised with a completion mask": Script(
        partial(tokenised, extra="completion_mask"), {"completion_only_loss": True}
    ),
    "tokenised with assistant masks": Script(partial(tokenised, extra="assistant_masks")),
    "tokenised, preparation skipped": Script(
        partial(tokenised, extra="labels"), {"dataset_kwargs": {"skip_prepare_dataset": True}}
    ),
    "a stream": Script(lambda: texts().to_iterable_dataset()),
    "a stream of conversations": chatting(rows=lambda: chats().to_iterable_dataset()),
    "a formatting function": Script(
        lambda: prompts().rename_columns({"prompt": "asked", "completion": "answer"}),
        extra={"formatting_func": lambda row: f"{row['asked']} w1 {row['answer']}"},
    ),
    # -- which tokens are learned
    "all tokens of a completion dataset": Script(options={"completion_only_loss": False}),
    "assistant tokens, by tags of the template": chatting(options={"assistant_only_loss": True}),
    "assistant tokens, by TRL's training template": Script(
        chats, {"assistant_only_loss": True, "max_length": 64}, partial(chat_tokenizer, untagged_template("qwen3"))
    ),
    "assistant tokens of completions": chatting(rows=chat_prompts, options={"assistant_only_loss": True}),
    # -- shapes of batches
    "truncated": Script(texts, {"max_length": 5}),
    "truncated from the left": Script(texts, {"max_length": 5, "truncation_mode": "keep_end"}),
    "padded to a multiple": Script(options={"pad_to_multiple_of": 8}),
    "packed, best fit": Script(texts, {"packing": True, "max_length": 12}),
    "packed, best fit, overflow split": Script(
        texts, {"packing": True, "packing_strategy": "bfd_split", "max_length": 6}
    ),
    "packed, wrapped": Script(texts, {"packing": True, "packing_strategy": "wrapped", "max_length": 12}),
    "packed completions": Script(options={"packing": True, "max_length": 16}),
    "without padding": Script(options={"padding_free": True, "max_length": None}),
    "shuffled": Script(options={"shuffle_dataset": True}),
    "accumulated": Script(options={"gradient_accumulation_steps": 2}),
    # -- losses
    "dynamic fine-tuning": Script(options={"loss_type": "dft"}),
    "the loss head by its old name": Script(options={"loss_type": "chunked_nll"}),
    "smoothed labels": Script(options={"label_smoothing_factor": 0.1}),
    "experts, balanced": Script(model=partial(tiny_model, "mixtral")),
    "experts, balanced more": Script(model=partial(tiny_model, "qwen3-moe"), options={"router_aux_loss_coef": 0.5}),
    "experts, not balanced": Script(model=partial(tiny_model, "mixtral"), options={"router_aux_loss_coef": 0.0}),
    # -- special tokens
    "another end of text": Script(options={"eos_token": "w3"}),
    "another padding token": Script(options={"pad_token": "w4"}),
}


def as_trl(script: Script, folder: Path) -> Any:
    """Return the logs of TRL's own trainer, which computes each batch at the initial weights."""
    options = {"learning_rate": 0.0, "gradient_checkpointing": False}
    trainer = script.trainer(folder, trainer_class=SFTTrainer, config_class=SFTConfig, **options)
    trainer.train()
    return trainer


def as_zo(script: Script, folder: Path, **options: Any) -> Any:
    return script.trainer(folder, trainer_class=ZOSFTTrainer, config_class=ZOSFTConfig, zo_eps=ZO_EPS, **options)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*padding:UserWarning")
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
def test_a_trl_script_trains_with_only_the_class_names_changed(script: Script, tmp_path: Path) -> None:
    plain = as_trl(script, tmp_path / "trl")
    with closing(as_zo(script, tmp_path / "zo", **STREAMED_FROM_DISK)) as trainer:
        before = weights_of(trainer.model)
        trainer.train()
        changed = differing(weights_of(trainer.model), before)
        assert sorted(changed) == sorted(name for name, p in trainer.model.named_parameters() if p.requires_grad)
        ours, theirs = step_logs(trainer), [entry for entry in plain.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == N_STEPS
    metrics = {name for name in theirs[0] if name in ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss")}
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= metrics
    for name in ("loss", *metrics):  # the first step is at the same weights
        assert ours[0][name] == pytest.approx(theirs[0][name], abs=3e-5), name
    assert [log["num_tokens"] for log in ours] == [log["num_tokens"] for log in theirs]
    assert not [name for log in ours for name in log if name.startswith("eval_")]


# -- chat templates from files

RESIZED = 128  # TRL rounds up to a multiple of 64


def test_a_chat_template_from_a_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(GENERATION_TAGGED)
    script = Script(chats, {"chat_template_path": str(path)}, tokenizer=partial(chat_tokenizer, None))
    with closing(as_zo(script, tmp_path / "zo")) as trainer, closing(as_zo(chatting(), tmp_path / "same")) as other:
        assert trainer.processing_class.chat_template == GENERATION_TAGGED
        assert trainer.train_dataset[0]["input_ids"] == other.train_dataset[0]["input_ids"]
        trainer.train()


@pytest.mark.parametrize("as_path", [True, False], ids=["a path", "a loaded model"])
def test_a_chat_template_of_another_tokenizer_brings_its_tokens_into_the_model(as_path: bool, tmp_path: Path) -> None:
    source = chat_tokenizer()
    source.add_special_tokens({"additional_special_tokens": ["<|think|>", "<|end|>"]})
    source.save_pretrained(tmp_path / "source")
    small_model().save_pretrained(tmp_path / "start")
    script = Script(chats, {"chat_template_path": str(tmp_path / "source"), **STREAMED_FROM_DISK}, chat_tokenizer)
    options = {**QUIET, **script.options, "max_length": 32, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run")}

    def make(n_steps: int) -> Any:
        model = str(tmp_path / "start") if as_path else small_model()
        config = ZOSFTConfig(**{**options, "max_steps": n_steps})
        return ZOSFTTrainer(model=model, args=config, train_dataset=chats(), processing_class=chat_tokenizer())

    with closing(make(2)) as trainer:
        assert trainer.model.get_input_embeddings().weight.shape[0] == RESIZED
        assert trainer.processing_class.chat_template == GENERATION_TAGGED
        trainer.train()
    with closing(make(4)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        found = weights_of(trainer.model)
    run_command(["export", str(tmp_path / "run" / "store"), str(tmp_path / "exported")])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert differing(weights_of(exported), found) == []


# -- evaluation


def evaluated(script: Script, folder: Path, *, is_zo: bool, **options: Any) -> dict[str, float]:
    make = as_zo if is_zo else as_trl_untrained
    trainer = make(script, folder, **options)
    found = trainer.evaluate()
    if is_zo:
        trainer.close()
    return {name: value for name, value in found.items() if not any(part in name for part in TIMES)}


TIMES = ("runtime", "per_second", "preparation_time")


def as_trl_untrained(script: Script, folder: Path, **options: Any) -> Any:
    return script.trainer(folder, trainer_class=SFTTrainer, config_class=SFTConfig, **options)


def share_right(prediction: EvalPrediction) -> dict[str, float]:
    labels = prediction.label_ids[:, 1:]
    is_right = (prediction.predictions[:, :-1] == labels)[labels != -100]
    return {"share": float(is_right.mean()), "n": is_right.size}


def best_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


SETS = {"near": texts(5), "far": texts(7).select(range(2, 7))}

EVALUATIONS: dict[str, Script] = {
    "several sets": Script(texts, extra={"eval_dataset": SETS}),
    "with metrics": Script(
        texts,
        extra={"eval_dataset": SETS, "compute_metrics": share_right, "preprocess_logits_for_metrics": best_tokens},
    ),
    "packed only in evaluation": Script(texts, {"eval_packing": True}, extra={"eval_dataset": texts(6)}),
    "packed only in training": Script(
        texts, {"packing": True, "eval_packing": False}, extra={"eval_dataset": texts(6)}
    ),
    "experts": Script(texts, model=partial(tiny_model, "mixtral"), extra={"eval_dataset": SETS}),
    "dynamic fine-tuning": Script(texts, {"loss_type": "dft"}, extra={"eval_dataset": texts(5)}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("script", EVALUATIONS.values(), ids=list(EVALUATIONS))
def test_evaluations_are_those_of_trl(script: Script, tmp_path: Path) -> None:
    theirs = evaluated(script, tmp_path / "trl", is_zo=False, gradient_checkpointing=False)
    ours = evaluated(script, tmp_path / "zo", is_zo=True, **STREAMED_FROM_DISK)
    assert ours == pytest.approx(theirs, abs=2e-6)
    assert any(name.endswith("mean_token_accuracy") for name in ours)


@pytest.mark.nightly
def test_a_dataset_is_prepared_by_several_processes(tmp_path: Path) -> None:
    rows = {}
    for n_processes in (1, 2):
        script = Script(lambda: texts(24), {"dataset_num_proc": n_processes})
        with closing(as_zo(script, tmp_path / str(n_processes))) as trainer:
            rows[n_processes] = trainer.train_dataset[:]
    assert rows[1] == rows[2]


def test_evaluating_between_steps_files_metrics_under_their_own_mode(tmp_path: Path) -> None:
    script = Script(texts, {"eval_strategy": "steps", "eval_steps": 1}, extra={"eval_dataset": SETS})
    with closing(as_zo(script, tmp_path)) as trainer:
        trainer.train()
        logs = trainer.state.log_history
    n_tokens = [log["num_tokens"] for log in logs if "num_tokens" in log]
    for log in logs:
        is_evaluation = any(name.startswith("eval_") and name.endswith("_loss") for name in log)
        assert is_evaluation == any(name.startswith("eval_") for name in log)
        assert not (is_evaluation and {"entropy", "mean_token_accuracy"} & set(log))
    assert n_tokens == sorted(n_tokens)
    counted = as_trl(Script(texts), tmp_path / "trl").state.log_history  # which evaluates nothing in between
    assert n_tokens[:N_STEPS] == [log["num_tokens"] for log in counted if "num_tokens" in log][:N_STEPS]


# -- the user's losses, and written files


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_loss_function_of_the_users_is_the_loss(tmp_path: Path) -> None:
    def cubed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return (outputs.logits.float() ** 3).mean() + labels.float().mean() / 1e3

    script = Script(extra={"compute_loss_func": cubed})
    plain = as_trl(script, tmp_path / "trl")
    with closing(as_zo(script, tmp_path / "zo")) as trainer:
        trainer.train()
        found = step_logs(trainer)[0]
    assert found["loss"] == pytest.approx(plain.state.log_history[0]["loss"], abs=3e-5)
    assert found["mean_token_accuracy"] == pytest.approx(plain.state.log_history[0]["mean_token_accuracy"])


def test_the_model_card_and_the_models_tags_are_those_of_trl(tmp_path: Path) -> None:
    script, cards = Script(), {}
    for name, make in (("trl", as_trl_untrained), ("zo", as_zo)):
        trainer = make(script, tmp_path / name)
        trainer.create_model_card(model_name="tiny", dataset_name="made/up", tags=["mine"])
        assert set(trainer.model.model_tags) >= {"trl", "sft"}
        cards[name] = (tmp_path / name / "README.md").read_text()
    assert cards["zo"] == cards["trl"]
    assert all(f"- {tag}\n" in cards["zo"] for tag in ("trl", "sft", "mine"))
