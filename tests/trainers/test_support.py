"""Arguments that forward-only training cannot honour are refused or warned about, by name; never silently ignored."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_constant_schedule

from tests.support.models import tiny_model, tiny_rows
from tests.support.runs import closing, prompts, sft_trainer, zo_trainer
from zo2trl import ZOConfig, ZOSFTConfig, ZOTrainer
from zo2trl.errors import ConfigError, UnsupportedError, ZO2TRLError
from zo2trl.trainers.support import check_arguments


def make(folder: Path, **options: Any) -> Any:
    return zo_trainer(folder, tiny_model("opt"), tiny_rows("opt", 4), **options)


def untouched(folder: Path) -> bool:
    return not (folder / "store").exists()


# -- warned about


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_is_ignored_with_a_warning_that_says_why(name: str, tmp_path: Path) -> None:
    if name not in ZOConfig.__dataclass_fields__:
        pytest.skip("this transformers has no argument of that name")
    with pytest.warns(UserWarning, match=r"_checkpointing=True` is ignored: there is no backward pass"):
        trainer = make(tmp_path, **{name: True})
    with closing(trainer):
        assert not trainer.args.gradient_checkpointing
        assert not trainer.model.is_gradient_checkpointing
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim", "adafactor"),
        ("adam_beta1", 0.5),
        ("adam_epsilon", 1e-4),
        ("neftune_noise_alpha", 5.0),
        ("ddp_find_unused_parameters", False),
        ("torch_compile", True),
    ],
)
def test_a_choice_without_effect_is_warned_about_once_by_name(name: str, value: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make(tmp_path, **{name: value}).close()
    assert len([w for w in seen if f"`{name}=" in str(w.message) and "no effect" in str(w.message)]) == 1


def test_a_noise_that_is_announced_as_ignored_is_ignored(tmp_path: Path) -> None:
    losses = []
    for i, alpha in enumerate((None, 50.0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = make(tmp_path / str(i), neftune_noise_alpha=alpha, max_steps=1)
        with closing(trainer):
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("config_class", [ZOConfig, ZOSFTConfig])
def test_defaults_are_not_warned_about(config_class: Any, tmp_path: Path) -> None:
    config = config_class(output_dir=str(tmp_path), use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_arguments(config)


# -- refused


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_another_dtype_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"`{name}=True`.*model_init_kwargs"):
        make(tmp_path, **{name: True})
    assert untouched(tmp_path)


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    config = ZOConfig(output_dir=str(tmp_path), use_cpu=True)
    config.deepspeed = {"zero_optimization": {"stage": 3}}  # upstream wants the package installed to take it itself
    with pytest.raises(UnsupportedError, match=r"`deepspeed=.*owns the parameters"):
        check_arguments(config)


def test_fsdp_is_refused(tmp_path: Path) -> None:
    config = ZOConfig(output_dir=str(tmp_path), use_cpu=True)
    config.fsdp = ["full_shard"]
    with pytest.raises(UnsupportedError, match=r"`fsdp=.*owns the parameters"):
        check_arguments(config)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_a_launcher_configured_for_sharding_is_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ZOConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UnsupportedError, match="distributed_type: NO"):
        check_arguments(config)


def test_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    config = ZOConfig(output_dir=str(tmp_path), use_cpu=True)
    config.parallelism_config = object()
    with pytest.raises(UnsupportedError, match="`parallelism_config"):
        check_arguments(config)


def test_activation_offloading_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="`activation_offloading=True`"):
        sft_trainer(tmp_path, tiny_model("opt"), activation_offloading=True)
    assert untouched(tmp_path)


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


def test_every_upstream_argument_has_been_thought_of(tmp_path: Path) -> None:
    # A new transformers may bring an argument that must be refused: this list is what has been looked at.
    suspicious = ("deepspeed", "fsdp", "full_eval", "checkpointing", "parallel", "offload", "adam", "optim", "ddp_")
    found = {
        name for name in TrainingArguments.__dataclass_fields__ if any(part in name for part in suspicious)
    } - {"parallel_mode"}  # fmt: skip
    known = {
        "deepspeed", "fsdp", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap",
        "bf16_full_eval", "fp16_full_eval", "gradient_checkpointing", "gradient_checkpointing_kwargs",
        "activation_checkpointing", "activation_checkpointing_kwargs", "parallelism_config", "adam_beta1",
        "adam_beta2", "adam_epsilon", "optim", "optim_args", "optim_target_modules", "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout", "ddp_static_graph",
    }  # fmt: skip
    assert found - known == set()
