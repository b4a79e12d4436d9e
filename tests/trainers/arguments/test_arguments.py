"""Arguments have the promised names and defaults, accept plain upstream configs, and work on the command line."""

import dataclasses
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import SFTConfig, TrlParser

from tests.support.models import tiny_model, tiny_rows
from tests.support.runs import QUIET, closing, prompts, sft_trainer, step_logs, zo_trainer
from tests.support.tokenizer import tiny_tokenizer
from zo2trl import ZOConfig, ZOSFTConfig, ZOSFTTrainer, ZOTrainer
from zo2trl.errors import ConfigError, UnsupportedError
from zo2trl.trainers.arguments.config import convert_arguments

CONFIGS = pytest.mark.parametrize("config_class", [ZOConfig, ZOSFTConfig])
DEFAULTS = {
    "device_memory": "auto", "cpu_memory": "auto", "direction": "rademacher", "zo_eps": 1e-3, "num_directions": 1,
    "weight_decay": 0.0, "rounding": None, "write_back_every": "auto", "granularity": "auto", "max_grad_norm": 0.0,
    "gradient_checkpointing": False, "lr_scheduler_type": "constant", "learning_rate": 1e-6,
}  # fmt: skip


@CONFIGS
def test_defaults_are_the_documented_ones(config_class: Any, tmp_path: Path) -> None:
    config = config_class(output_dir=str(tmp_path), use_cpu=True)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.store_path == tmp_path / "store"


@CONFIGS
def test_a_store_follows_the_output_folder_of_a_sweep(config_class: Any, tmp_path: Path) -> None:
    config = config_class(output_dir=str(tmp_path / "a"), use_cpu=True)
    assert replace(config, output_dir=str(tmp_path / "b")).store_path == tmp_path / "b" / "store"
    config.output_dir = str(tmp_path / "c")
    assert config.store_path == tmp_path / "c" / "store"


@CONFIGS
def test_a_config_of_defaults_warns_about_nothing(config_class: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_class(output_dir=str(tmp_path), use_cpu=True)


@CONFIGS
def test_a_store_elsewhere_is_left_there(config_class: Any, tmp_path: Path) -> None:
    config = config_class(output_dir=str(tmp_path / "out"), store_dir=str(tmp_path / "fast"), use_cpu=True)
    assert config.store_path == tmp_path / "fast"


@CONFIGS
def test_configs_survive_being_saved_and_rebuilt(config_class: Any, tmp_path: Path) -> None:
    config = config_class(output_dir=str(tmp_path), use_cpu=True, zo_eps=1e-2, device_memory="1GB")
    again = dataclasses.replace(config, learning_rate=5e-5)
    assert (again.zo_eps, again.device_memory, again.learning_rate) == (1e-2, "1GB", 5e-5)
    assert config_class(**{k: v for k, v in config.to_dict().items() if not k.endswith("_token")}).zo_eps == 1e-2


@CONFIGS
def test_every_argument_can_be_given_on_the_command_line(config_class: Any, tmp_path: Path) -> None:
    parser = HfArgumentParser(config_class)
    words = (
        f"--output_dir {tmp_path} --use_cpu --device_memory 2GB --cpu_memory 0 --zo_eps 1e-2 --direction gaussian "
        "--num_directions 2 --granularity leaf --write_back_every 4 --rounding nearest --learning_rate 1e-5"
    )
    (config,) = parser.parse_args_into_dataclasses(words.split())
    assert (config.device_memory, config.cpu_memory, config.zo_eps) == ("2GB", "0", 1e-2)
    assert (config.direction, config.num_directions, config.granularity) == ("gaussian", 2, "leaf")
    assert (str(config.write_back_every), config.rounding, config.learning_rate) == ("4", "nearest", 1e-5)
    assert "device_memory" in parser.format_help()


@pytest.mark.parametrize(("ours", "upstream"), [(ZOConfig, TrainingArguments), (ZOSFTConfig, SFTConfig)])
def test_a_flag_without_a_value_means_what_it_means_upstream(ours: Any, upstream: Any, tmp_path: Path) -> None:
    for flag in (field.name for field in fields(upstream) if field.type is bool):
        words = ["--output_dir", str(tmp_path), "--use_cpu", f"--{flag}"]
        try:
            (theirs,) = HfArgumentParser(upstream).parse_args_into_dataclasses(words)
        except (ValueError, ImportError):
            continue  # it requires another argument
        (given,) = HfArgumentParser(ours).parse_args_into_dataclasses(words)
        assert getattr(given, flag) in (True, getattr(theirs, flag)), flag


def test_arguments_come_from_yaml_through_trls_parser(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nzo_eps: 0.01\ndevice_memory: 2GB\ncpu_memory: 0\nstore_dir: s\n"
    )
    (config,) = TrlParser(ZOSFTConfig).parse_args_and_config(["--config", str(file), "--direction", "gaussian"])
    assert (config.zo_eps, config.device_memory, config.store_dir) == (0.01, "2GB", "s")
    assert str(config.cpu_memory) == "0"
    assert config.direction == "gaussian"


# -- sizes and numbers


@pytest.mark.parametrize("size", ["8GB", "8GiB", "512MB", 8_000_000_000, "min", "auto", "1.5 GB"])
def test_sizes_are_accepted_as_documented(size: Any, tmp_path: Path) -> None:
    assert ZOConfig(output_dir=str(tmp_path), device_memory=size).device_memory == size


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("device_memory", "lots", "8GB"),
        ("device_memory", -1, "8GB"),
        ("cpu_memory", "8 gigs", "8GB"),
        ("zo_eps", 0.0, "positive"),
        ("zo_eps", float("nan"), "positive"),
        ("zo_eps", -1e-3, "positive"),
        ("num_directions", 0, "at least 1"),
        ("write_back_every", 0, "at least 1"),
        ("write_back_every", "often", "auto"),
        ("direction", "gausian", "'gaussian'"),
        ("direction", "radmacher", "'rademacher'"),
        ("rounding", "stochastik", "'stochastic'"),
        ("granularity", "leaves", "'leaf'"),
    ],
)
@CONFIGS
def test_nonsense_is_refused_by_name_with_what_would_work(
    config_class: Any, name: str, value: Any, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`") as error:
        config_class(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    assert hint in str(error.value)
    assert str(value) in str(error.value)


@CONFIGS
def test_deepspeed_is_refused_by_name_whether_it_is_installed_or_not(config_class: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="deepspeed"):
        config_class(output_dir=str(tmp_path), use_cpu=True, deepspeed="zero3.json")


# -- plain upstream configs


def test_a_plain_training_arguments_gets_our_defaults_and_keeps_its_choices(tmp_path: Path) -> None:
    plain = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, weight_decay=0.5, report_to="none", use_cpu=True, logging_steps=1
    )
    with closing(ZOTrainer(tiny_model("opt"), plain, train_dataset=tiny_rows("opt", 20))) as trainer:
        args = trainer.args
        trainer.train()
        rates = {record.learning_rate for record in trainer.engine.store.journal.records}
        assert len(step_logs(trainer)) == 2
    assert isinstance(args, ZOConfig)
    assert (args.max_steps, args.weight_decay, args.max_grad_norm, args.store_path) == (
        2, 0.5, 0.0, tmp_path / "store",
    )  # fmt: skip
    assert rates == {1e-6}
    assert plain.learning_rate == 5e-5  # the user's object is not changed


def test_what_the_user_changed_in_a_plain_config_is_kept(tmp_path: Path) -> None:
    plain = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, lr_scheduler_type="cosine", max_grad_norm=2.0, use_cpu=True
    )
    config = convert_arguments(plain, ZOConfig)
    assert (config.learning_rate, config.lr_scheduler_type, config.max_grad_norm) == (3e-4, "cosine", 2.0)


def test_a_plain_sft_config_keeps_its_tokens_and_trains(tmp_path: Path) -> None:
    plain = SFTConfig(
        eos_token="</s>", pad_token="<pad>", output_dir=str(tmp_path), bf16=False,
        **{k: v for k, v in QUIET.items() if k not in ("learning_rate", "bf16")}, max_length=16, packing=False,
    )  # fmt: skip
    with closing(
        ZOSFTTrainer(tiny_model("opt"), plain, train_dataset=prompts(), processing_class=tiny_tokenizer())
    ) as trainer:
        args = trainer.args
        trainer.train()
        assert len(step_logs(trainer)) == 3
    assert isinstance(args, ZOSFTConfig)
    assert (args.eos_token, args.pad_token, args.max_length) == ("</s>", "<pad>", 16)
    assert (args.learning_rate, args.gradient_checkpointing) == (1e-6, False)


def test_a_plain_sft_config_does_not_warn_about_checkpointing_it_only_has_by_default(tmp_path: Path) -> None:
    plain = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_steps=1)
    assert plain.gradient_checkpointing
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = ZOSFTTrainer(tiny_model("opt"), plain, train_dataset=prompts(), processing_class=tiny_tokenizer())
    trainer.close()
    assert not [w for w in seen if "checkpointing" in str(w.message)]


def test_without_any_arguments_the_output_folder_is_named_after_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("opt").save_pretrained(tmp_path / "tiny-opt")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny-opt")
    trainer = ZOSFTTrainer(str(tmp_path / "tiny-opt"), train_dataset=prompts())
    trainer.close()
    assert "tiny-opt" in trainer.args.output_dir
    assert isinstance(trainer.args, ZOSFTConfig)


@pytest.mark.parametrize("make", [zo_trainer, sft_trainer], ids=["trainer", "sft"])
def test_the_saved_arguments_say_what_was_run(make: Any, tmp_path: Path) -> None:
    rows = tiny_rows("opt", 4) if make is zo_trainer else prompts()
    with closing(make(tmp_path, tiny_model("opt"), rows, zo_eps=1e-2, max_steps=1)) as trainer:
        trainer.train()
        assert trainer.args.to_dict()["zo_eps"] == 1e-2
        assert '"zo_eps": 0.01' in trainer.args.to_json_string()
