"""Every argument of upstream's configs is supported, warned about, or refused, by name; none is silently ignored."""

import dataclasses
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_constant_schedule
from trl import DPOConfig, RewardConfig, SFTConfig

from tests.support.models import tiny_model, tiny_rows
from tests.support.runs import closing, differing, prompts, sft_trainer, weights_of, zo_trainer
from tests.support.trainings import small_model
from zo2trl import ZOConfig, ZODPOConfig, ZORewardConfig, ZOSFTConfig, ZOTrainer
from zo2trl.errors import ConfigError, UnsupportedError, ZO2TRLError
from zo2trl.trainers.arguments.config import convert_arguments
from zo2trl.trainers.arguments.refusals import check_arguments, upstream_fields
from zo2trl.trainers.arguments.support_page import CONFIGS, versions
from zo2trl.trainers.arguments.upstream_arguments import REFUSED, SUPPORTED, WITHOUT_EFFECT

PAGE = Path(__file__).parents[3] / "docs" / "support.md"
OURS: dict[type, Any] = {
    TrainingArguments: ZOConfig, SFTConfig: ZOSFTConfig, DPOConfig: ZODPOConfig, RewardConfig: ZORewardConfig,
}  # fmt: skip
FIRST_WITH = {name: upstream for upstream in reversed(CONFIGS) for name in upstream_fields(upstream)}
"""Field -> the first of the upstream configs that has it."""


def untouched(folder: Path) -> bool:
    return not (folder / "store").exists()


def config_with(name: str, value: Any, folder: Path) -> Any:
    """Make a config of ours with one field set by the user, whatever upstream would do with it on this machine."""
    config = OURS[FIRST_WITH[name]](output_dir=str(folder), use_cpu=True, bf16=False)
    setattr(config, name, value)
    return config


# -- the table


def test_every_upstream_argument_has_been_classified_once() -> None:
    tables = (SUPPORTED, WITHOUT_EFFECT, REFUSED)
    unknown = {name for name in FIRST_WITH if not any(name in table for table in tables)}
    assert not unknown, f"{unknown} of {versions()}: say in upstream_arguments.py what becomes of it under ZO"
    names = [name for table in tables for name in table]
    assert sorted(names) == sorted(set(names))
    if versions() in PAGE.read_text():
        assert set(names) - set(FIRST_WITH) == set()


def test_an_argument_that_is_newer_than_this_package_is_handed_on_with_a_warning(tmp_path: Path) -> None:
    future = dataclasses.make_dataclass("Future", [("new_thing", int, 0)], bases=(TrainingArguments,))
    future.__module__ = "transformers.training_args"
    mine = dataclasses.make_dataclass("Mine", [("own_thing", int, 0)], bases=(future,))
    config = mine(output_dir=str(tmp_path), use_cpu=True, own_thing=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning: a default, and a field of the user's own
        check_arguments(config)
    config.new_thing = 7
    with pytest.warns(UserWarning, match="`new_thing=7` is newer than this zo2trl"):
        check_arguments(config)


@pytest.mark.parametrize("upstream", CONFIGS)
def test_defaults_are_not_warned_about(upstream: Any, tmp_path: Path) -> None:
    config = OURS[upstream](output_dir=str(tmp_path), use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_arguments(config)


# -- supported

CHOSEN: dict[str, Any] = {
    "output_dir": "elsewhere", "per_device_train_batch_size": 3, "num_train_epochs": 2.0, "max_steps": 7,
    "learning_rate": 3e-4, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 3, "weight_decay": 0.1, "gradient_accumulation_steps": 2, "average_tokens_across_devices": False,
    "max_grad_norm": 0.5, "label_smoothing_factor": 0.1, "bf16": True, "fp16": True, "tf32": False, "use_cache": True,
    "torch_empty_cache_steps": 2, "auto_find_batch_size": True, "logging_strategy": "epoch", "logging_steps": 3,
    "logging_first_step": True, "log_on_each_node": False, "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "all", "log_level": "error", "log_level_replica": "error", "disable_tqdm": True,
    "report_to": "none", "run_name": "name", "project": "mine", "trackio_space_id": "a/b", "trackio_bucket_id": "a/c",
    "trackio_static_space_id": "a/d", "eval_strategy": "epoch", "eval_steps": 2, "eval_delay": 1,
    "per_device_eval_batch_size": 3, "prediction_loss_only": True, "eval_on_start": True,
    "eval_do_concat_batches": False, "eval_use_gather_object": True, "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"], "batch_eval_metrics": True, "save_only_model": True, "save_strategy": "epoch",
    "save_steps": 7, "save_on_each_node": True, "save_total_limit": 2, "push_to_hub": True, "hub_token": "secret",
    "hub_private_repo": True, "hub_model_id": "me/model", "hub_strategy": "end", "hub_always_push": True,
    "hub_revision": "branch", "load_best_model_at_end": False, "metric_for_best_model": "loss",
    "greater_is_better": False, "ignore_data_skip": True, "restore_callback_states_from_checkpoint": True,
    "full_determinism": True, "seed": 7, "data_seed": 8, "use_cpu": True,
    "accelerator_config": {"split_batches": True}, "dataloader_drop_last": True, "dataloader_num_workers": 1,
    "dataloader_pin_memory": False, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn", "dataloader_in_order": False, "remove_unused_columns": False,
    "label_names": ["labels"], "train_sampling_strategy": "sequential", "length_column_name": "size",
    "ddp_timeout": 60, "debug": "underflow_overflow", "skip_memory_metrics": False,
    "do_train": True, "do_eval": True, "do_predict": True, "resume_from_checkpoint": "folder", "local_rank": -1,
    "model_init_kwargs": {"dtype": "bfloat16"}, "trust_remote_code": True, "router_aux_loss_coef": 0.1,
    "chat_template_path": "file.jinja", "dataset_text_field": "said", "dataset_num_proc": 2,
    "dataset_kwargs": {"skip_prepare_dataset": True}, "eos_token": "<s>", "max_length": 5,
    "truncation_mode": "keep_end", "shuffle_dataset": True, "packing": True, "packing_strategy": "wrapped",
    "padding_free": True, "pad_to_multiple_of": 8, "eval_packing": True, "completion_only_loss": True,
    "assistant_only_loss": True, "loss_type": "dft", "pad_token": "<p>", "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 2, "loss_weights": [0.5], "ld_alpha": 0.5, "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.2, "label_smoothing": 0.1, "beta": 0.3, "use_weighting": True, "discopop_tau": 0.1,
    "center_rewards_coefficient": 0.1,
}  # fmt: skip
"""A value that is none of the defaults, for every supported argument (some have only one that is legal anywhere)."""


NEEDS = {"dataloader_prefetch_factor": {"dataloader_num_workers": 1}}


def test_there_is_a_value_to_try_for_every_supported_argument() -> None:
    assert set(SUPPORTED) - set(CHOSEN) == {"ddp_backend"}  # it has no meaning without a launcher


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(CHOSEN.keys() & FIRST_WITH.keys()))
def test_a_supported_argument_is_taken_as_upstream_takes_it_and_says_nothing(name: str, tmp_path: Path) -> None:
    upstream = FIRST_WITH[name]
    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, name: CHOSEN[name], **NEEDS.get(name, {})}
    theirs = upstream(**given)
    for config in (OURS[upstream](**given), convert_arguments(upstream(**given), OURS[upstream])):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_arguments(config)
        assert getattr(config, name) == getattr(theirs, name)


# -- without effect

IDLE: dict[str, Any] = {
    "gradient_checkpointing": True, "activation_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "optim": "adafactor", "optim_args": "a=1", "optim_target_modules": ["q_proj"], "adam_beta1": 0.5,
    "adam_beta2": 0.5, "adam_epsilon": 1e-4, "neftune_noise_alpha": 50.0, "torch_compile": True,
    "torch_compile_backend": "eager", "torch_compile_mode": "default", "use_liger_kernel": True,
    "liger_kernel_config": {"rope": False}, "enable_jit_checkpoint": True, "disable_dropout": False,
    "ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 3, "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
}  # fmt: skip
"""Values that would change something with backpropagation."""


def test_there_is_a_value_to_try_for_every_argument_without_effect() -> None:
    assert set(IDLE) == set(WITHOUT_EFFECT)


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT.keys() & FIRST_WITH.keys()))
def test_a_choice_without_effect_is_warned_about_once_by_name_with_the_reason(name: str, tmp_path: Path) -> None:
    config = config_with(name, IDLE[name], tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check_arguments(config)
    (message,) = [str(w.message) for w in seen if f"`{name}=" in str(w.message)]
    assert message == f"`{name}={IDLE[name]!r}` has no effect in ZO training: {WITHOUT_EFFECT[name]}."


def one_step(folder: Path, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = zo_trainer(folder, small_model(), tiny_rows("opt", 4), max_steps=1, **options)
    with closing(trainer):
        trainer.train()
        return trainer.state.log_history[0]["loss"], weights_of(trainer.model)


def test_choices_without_effect_change_no_bit_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):  # upstream sets them for the process
        monkeypatch.setenv(variable, "no")
    loss, weights = one_step(tmp_path / "plain")
    options = {name: value for name, value in IDLE.items() if name in ZOConfig.__dataclass_fields__}
    found_loss, found = one_step(tmp_path / "chosen", **options)
    assert found_loss == loss
    assert differing(found, weights) == []


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_what_upstream_would_act_on_is_switched_off(name: str, tmp_path: Path) -> None:
    if name not in ZOConfig.__dataclass_fields__:
        pytest.skip("this transformers has no argument of that name")
    with pytest.warns(UserWarning, match=r"_checkpointing=True` has no effect .* there is no backward pass"):
        trainer = zo_trainer(tmp_path, small_model(), tiny_rows("opt", 4), **{name: True})
    with closing(trainer):
        assert not trainer.args.gradient_checkpointing
        assert not trainer.model.is_gradient_checkpointing


def test_no_handler_of_sigterm_is_installed_for_checkpoints_that_nobody_needs(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.warns(UserWarning, match="`enable_jit_checkpoint=True` has no effect"):
        trainer = zo_trainer(tmp_path, small_model(), tiny_rows("opt", 4), enable_jit_checkpoint=True)
    with closing(trainer):
        assert signal.getsignal(signal.SIGTERM) is before


# -- refused

IMPOSSIBLE: dict[str, Any] = {
    "deepspeed": {"zero_optimization": {"stage": 3}}, "fsdp": ["full_shard"], "fsdp_config": {"min_num_params": 9},
    "parallelism_config": object(), "bf16_full_eval": True, "fp16_full_eval": True, "activation_offloading": True,
    "sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 3,
}  # fmt: skip


def test_there_is_a_value_to_try_for_every_refused_argument() -> None:
    assert set(IMPOSSIBLE) == set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & FIRST_WITH.keys()))
def test_what_cannot_work_is_refused_by_name_with_the_reason_and_the_way_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_arguments(config_with(name, IMPOSSIBLE[name], tmp_path))
    assert str(caught.value).startswith(f"`{name}=")
    assert REFUSED[name] in str(caught.value)
    assert any(word in REFUSED[name] for word in ("Remove", "instead"))


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval", "activation_offloading"])
def test_a_refused_argument_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"`{name}=True`"):
        sft_trainer(tmp_path, tiny_model("opt"), **{name: True})
    assert untouched(tmp_path)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_a_launcher_configured_for_sharding_is_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ZOConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UnsupportedError, match="distributed_type: NO"):
        check_arguments(config)


def test_an_optimizer_of_the_users_is_refused_with_what_to_set_instead(tmp_path: Path) -> None:
    model = tiny_model("opt")
    optimizer = torch.optim.AdamW(model.parameters())
    for extra in (
        {"optimizers": (optimizer, None)},
        {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-3})},
    ):
        with pytest.raises(ConfigError, match=r"holds an optimizer.*`learning_rate`"):
            zo_trainer(tmp_path, model, tiny_rows("opt", 4), extra=extra)
    assert untouched(tmp_path)


def test_an_optimizer_passed_by_position_is_refused_too(tmp_path: Path) -> None:
    model = tiny_model("opt")
    optimizer = torch.optim.AdamW(model.parameters())
    config = ZOConfig(output_dir=str(tmp_path), use_cpu=True)
    before_optimizers = (None, tiny_rows("opt", 4), None, None, None, None, None, None)
    with pytest.raises(ConfigError, match="`optimizers` holds an optimizer"):
        ZOTrainer(model, config, *before_optimizers, (optimizer, None))


def test_a_scheduler_of_the_users_is_refused_with_the_argument_that_does_it(tmp_path: Path) -> None:
    model = tiny_model("opt")
    scheduler = get_constant_schedule(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ConfigError, match="`lr_scheduler_type`"):
        zo_trainer(tmp_path, model, tiny_rows("opt", 4), extra={"optimizers": (None, scheduler)})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"load_in_4bit": True},
        {"device_map": "auto", "max_memory": {0: "1GB"}},
        {"tp_plan": "auto"},
    ],
    ids=["quantised", "placed", "tensor-parallel"],
)
def test_loading_arguments_that_place_or_quantise_are_refused(kwargs: dict, tmp_path: Path) -> None:
    tiny_model("opt").save_pretrained(tmp_path / "start")
    with pytest.raises(ZO2TRLError):
        sft_trainer(tmp_path / "run", str(tmp_path / "start"), prompts(), model_init_kwargs=kwargs)
    assert untouched(tmp_path / "run")
