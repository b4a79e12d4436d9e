"""`zo2trl plan`: what it says is what the trainer does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.models import SPECIAL, VOCABULARY
from tests.support.rates import TWO_CORES, know
from tests.support.tokenizer import tiny_tokenizer
from zo2trl import ZOSFTConfig, ZOSFTTrainer, cli
from zo2trl.cli import plan as plan_command
from zo2trl.forecast import probe
from zo2trl.planning import known_rates
from zo2trl.planning.rates import MachineRates

SHAPE = {"per_device_train_batch_size": 2, "max_length": 16, "gradient_accumulation_steps": 2}
LOGGED = {
    "up": "zo/bytes_h2d", "down": "zo/bytes_d2h", "disk_read": "zo/bytes_disk_read",
    "disk_written": "zo/bytes_disk_written",
}  # fmt: skip
BUDGETS = {
    "resident": {"device_memory": "1GB", "cpu_memory": "0"},
    "host memory": {"device_memory": "700kB", "cpu_memory": "1GB"},
    "three tiers": {"device_memory": "700kB", "cpu_memory": "400kB"},
    "least": {"device_memory": "min", "cpu_memory": "0"},
}


@pytest.fixture(autouse=True)
def a_measured_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its rates are in a cache of the test's own; the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    know(tmp_path)
    return known_rates.cache_file()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, **SPECIAL, vocab_size=VOCABULARY)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def planned(capsys: pytest.CaptureFixture[str], model: Path, store: Path, **options: Any) -> dict[str, Any]:
    given = [part for key, value in options.items() for part in (f"--{key}", *([] if value is True else [str(value)]))]
    code = cli.main(["plan", str(model), "--store_dir", str(store), "--json", "--probe", "never", "--use_cpu", *given])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=list(BUDGETS))
def test_the_trainer_does_what_the_plan_says(
    budgets: dict[str, str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, model, tmp_path / "store", **SHAPE, **budgets, granularity="block", max_steps=4)
    rows = torch.randint(10, VOCABULARY, (16, SHAPE["max_length"])).tolist()
    trainer = ZOSFTTrainer(
        model=str(model),
        args=ZOSFTConfig(
            output_dir=str(tmp_path / "out"), store_dir=str(tmp_path / "store"), max_steps=4, use_cpu=True,
            granularity="block", logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
            **SHAPE, **budgets,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
    )  # fmt: skip
    trainer.train()
    store = trainer.engine.store
    assert [(u["name"], u["tier"], u["bytes"]) for u in plan["units"]] == store.describe()
    assert plan["device_bytes"] == store.placement.device_bytes
    written_every = {tier: plan["write_back_every"][tier] for tier in store.write_schedule.write_back}
    assert written_every == store.write_schedule.write_back
    steps = [entry for entry in trainer.state.log_history if "zo/bytes_h2d" in entry][1:]  # with a step to absorb
    for link, logged in LOGGED.items():
        assert plan["bytes_per_step"][link] in [step[logged] for step in steps], link
    assert plan["tokens_per_step"] == 64
    trainer.close()


def test_a_config_alone_is_enough(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    with_weights = planned(capsys, model, tmp_path, **SHAPE)
    without = planned(capsys, bare, tmp_path, **SHAPE)
    assert without["units"] == with_weights["units"] and without["parameters"] == with_weights["parameters"]


def test_a_frozen_base_is_read_and_never_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(
        capsys, model, tmp_path, **SHAPE, device_memory="min", cpu_memory="0", use_peft=True, lora_r=2, max_steps=9
    )
    assert 0 < plan["trainable_parameters"] < plan["parameters"] / 10
    assert plan["bytes_per_step"]["disk_read"] > 0
    assert plan["bytes_per_step"]["disk_written"] == plan["disk_written_bytes_per_run"] == 0
    assert all(unit["tier"] == "gpu" for unit in plan["units"] if unit["kind"] == "adapter")


def test_a_frozen_base_in_another_dtype_is_copied_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = {"device_memory": "min", "cpu_memory": "0"}
    adapter = {"use_peft": True, "lora_r": 2, "lora_target_modules": ".*q_proj"}
    plan = planned(capsys, model, tmp_path, **SHAPE, **budgets, **adapter, dtype="bfloat16", max_steps=2)
    frozen = sum(unit["bytes"] for unit in plan["units"] if unit["tier"] == "disk")
    assert plan["bytes_per_step"]["disk_written"] == 0 < frozen
    assert plan["disk_written_bytes_at_start"] == plan["disk_written_bytes_per_run"] == frozen
    assert plan["disk_peak_bytes"] == frozen
    trainer = ZOSFTTrainer(
        model=str(model),
        args=ZOSFTConfig(
            output_dir=str(tmp_path / "out"), store_dir=str(tmp_path / "store"), max_steps=2, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "bfloat16"},
            **budgets,
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[10, 11, 12, 13]] * 8}),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    on_disk = {name: n_bytes for name, tier, n_bytes in trainer.engine.store.describe() if tier == "disk"}
    files = [file for file in (tmp_path / "store").rglob("*@*") if file.name.partition("@")[0] in on_disk]
    trainer.close()
    assert sum(on_disk.values()) == frozen and len(files) == len(on_disk)
    assert frozen <= sum(file.stat().st_size for file in files) < 1.01 * frozen  # with checksums


def test_advice_of_another_dtype_says_what_it_writes_first(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    know(tmp_path, disk_read_bytes=1e5)

    def neighbours(planned: Any, args: Any, model_args: Any) -> list[tuple[str, Any, Any]]:
        return [("--dtype bfloat16", args, replace(model_args, dtype="bfloat16"))]

    monkeypatch.setattr(plan_command, "_neighbours", neighbours)
    command = ["plan", str(model), "--store_dir", str(tmp_path), "--use_cpu", "--probe", "never", "--max_length", "16"]
    command += ["--device_memory", "min", "--cpu_memory", "0"]
    assert cli.main([*command, "--use_peft"]) == 0
    of_frozen = capsys.readouterr().out
    assert "--dtype bfloat16" in of_frozen and "before the first step" in of_frozen and "zo_eps" not in of_frozen
    assert cli.main(command) == 0
    of_trained = capsys.readouterr().out
    assert "before the first step" not in of_trained and "docs/tuning.md" in of_trained
    monkeypatch.setattr(plan_command, "_free_on_disk", lambda folder: 1000)
    assert cli.main([*command, "--use_peft"]) == 0
    assert "--dtype bfloat16" not in capsys.readouterr().out


def test_autocast_is_planned_with(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    know(tmp_path, flops={"float32": 1e9, "bfloat16": 1e12})
    whole = planned(capsys, model, tmp_path, **SHAPE)
    cast = planned(capsys, model, tmp_path, **SHAPE, bf16="True")
    assert cast["seconds"]["forwards"] < 0.6 * whole["seconds"]["forwards"]
    assert cast["units"] == whole["units"]


def test_what_a_run_writes_is_what_its_steps_write(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**SHAPE, "device_memory": "min", "cpu_memory": "0", "max_steps": 50}
    every_step = planned(capsys, model, tmp_path, **options, write_back_every=1)
    sometimes = planned(capsys, model, tmp_path, **options, write_back_every=5)
    first = sum(unit["bytes"] for unit in every_step["units"] if unit["tier"] == "disk")
    assert every_step["disk_written_bytes_at_start"] == first
    assert every_step["disk_written_bytes_per_run"] == first + 50 * every_step["bytes_per_step"]["disk_written"]
    written = every_step["bytes_per_step"]["disk_written"]
    assert sometimes["bytes_per_step"]["disk_written"] == pytest.approx(written / 5)


def test_the_advice_is_another_plan_that_comes_true(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**SHAPE, "device_memory": "min", "cpu_memory": "0"}
    advice = planned(capsys, model, tmp_path, **options)["advice"]
    option, value = advice["option"].removeprefix("--").split()
    followed = planned(capsys, model, tmp_path, **{**options, option: value})
    assert followed["seconds_per_step"] == pytest.approx(advice["seconds_per_step"])
    assert followed["tokens_per_second"] == pytest.approx(advice["tokens_per_second"])


def test_more_tokens_take_longer_and_a_slower_drive_binds(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**SHAPE, "device_memory": "min", "cpu_memory": "0", "write_back_every": 1}
    fast = planned(capsys, model, tmp_path, **options)
    more = planned(capsys, model, tmp_path, **{**options, "max_length": 1024})
    assert more["seconds"]["forwards"] > 2 * fast["seconds"]["forwards"]
    know(tmp_path, disk_read_bytes=1e6)
    slowed = planned(capsys, model, tmp_path, **options)
    assert (slowed["bound"], slowed["hiding_tokens_per_step"] > 64) == ("disk", True)
    assert slowed["seconds_per_step"] > fast["seconds_per_step"]
    assert slowed["bytes_per_step"] == fast["bytes_per_step"]


def test_the_machine_is_measured_once_and_again_when_asked(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    a_measured_machine: Path,
) -> None:
    a_measured_machine.unlink()
    measured: list[Path] = []

    def measure(device: torch.device, folder: Path) -> MachineRates:
        measured.append(folder)
        return TWO_CORES

    monkeypatch.setattr(probe, "measure_machine", measure)
    command = ["plan", str(model), "--store_dir", str(tmp_path), "--use_cpu", "--max_length", "16"]
    for more, n_measured in ([], 1), ([], 1), (["--probe", "again"], 2), (["--probe", "never"], 2):
        assert cli.main([*command, *more]) == 0
        assert len(measured) == n_measured
    told = capsys.readouterr().out
    assert "bound by" in told and "Rates measured" in told and "weights live" in told


@pytest.mark.parametrize("arguments", [["--probe", "sometimes"], ["--learning_rate", "fast"], ["--seed"]], ids=str)
def test_a_badly_typed_value_is_told_without_all_arguments_there_are(
    arguments: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", str(model), *arguments])
    usage, told = capsys.readouterr().err.splitlines()
    assert "--help lists them" in usage and arguments[0] in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "No model was named"),
        (["/nowhere"], "/nowhere is no folder"),
        (["MODEL", "--device_memory", "1kB"], "cannot hold one step"),
        (["MODEL", "--device_memory", "much"], "`device_memory` is 'much'"),
        (["MODEL", "--no_such_option", "1"], "--no_such_option"),
        (["MODEL", "--devcie_memory", "1GB"], "Did you mean `--device_memory`?"),
        (["MODEL", "--num_processes", "2"], "`--num_processes` tells `accelerate launch`"),
        (["MODEL", "--beta", "0.1"], "`--beta` is an argument of `zo2trl dpo`"),
        (["MODEL", "--use_peft", "--lora_target_modules", "nonsense"], "nonsense not found"),
        (["MODEL", "other"], "`other` belongs to no option"),
        (["MODEL", "--objective", "squad_f1", "--objective_max_new_tokens", "32"], "cannot foresee `objective`"),
        (["MODEL", "--load_in_4bit", "--use_peft"], "cannot foresee a quantised base"),
        (["MODEL", "--max_length", "-5"], "`max_length` is -5"),
        (["MODEL", "--per_device_train_batch_size", "0"], "`per_device_train_batch_size` is 0"),
    ],
)
def test_what_cannot_be_planned_is_one_line_at_once(
    arguments: list[str],
    said: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "measure_machine", lambda *_, **__: pytest.fail("seconds for nothing"))
    given = [str(model) if each == "MODEL" else each for each in arguments]
    assert cli.main(["plan", *given, "--use_cpu"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("zo2trl: error: ") and told.count("\n") == 1 and said in told


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("devcie_memory: 1GB", "Did you mean `--device_memory`?"),
        ("beta: 0.1", "`--beta` is an argument of `zo2trl dpo`"),
        ("num_processes: 1", ""),
    ],
)
def test_a_file_may_hold_what_accelerate_reads_and_nothing_unknown(
    line: str, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(f"model_name_or_path: {model}\noutput_dir: {tmp_path}\nuse_cpu: true\nmax_length: 16\n{line}\n")
    code = cli.main(["plan", "--config", str(file), "--probe", "never", "--json"])
    told = capsys.readouterr()
    assert code == (2 if said else 0) and said in told.err
    assert said or json.loads(told.out)["model"] == str(model)


def test_the_model_may_come_after_the_flag_for_json(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--use_cpu", "--probe", "never", "--max_length", "16", "--output_dir", str(tmp_path)]
    assert cli.main(["plan", "--json", str(model), *more]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(model)


def first_word(model: Path, folder: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[str, Any]:
    """The start-up line of one step of a training, and its store's units."""
    length = options["max_length"]
    trainer = ZOSFTTrainer(
        model=str(model),
        args=ZOSFTConfig(
            output_dir=str(folder), store_dir=str(folder / "store"), max_steps=1, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=False, bf16=False, **options,
        ),
        train_dataset=Dataset.from_dict({"input_ids": torch.randint(10, VOCABULARY, (8, length)).tolist()}),
    )  # fmt: skip
    trainer.train()
    units = trainer.engine.store.describe()
    trainer.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "zo2trl: gpu:" in line]
    return line, units


@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=list(BUDGETS))
def test_a_trainers_first_word_is_what_the_plan_says(
    budgets: dict[str, str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, model, tmp_path / "store", **SHAPE, **budgets, bf16="False")
    line, units = first_word(model, tmp_path, capsys, **SHAPE, **budgets)
    assert f"about {plan['seconds_per_step']:.2g} s a step, bound by {plan['bound']}" in line
    assert [(u["name"], u["tier"], u["bytes"]) for u in plan["units"]] == units


def test_on_a_machine_that_was_not_measured_plan_and_first_word_guess_no_time(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], a_measured_machine: Path
) -> None:
    a_measured_machine.unlink()
    budgets = {"device_memory": "min", "cpu_memory": "0"}
    plan = planned(capsys, model, tmp_path / "store", **SHAPE, **budgets)
    assert plan["seconds_per_step"] is plan["seconds"] is plan["machine"] is plan["advice"] is None
    line, units = first_word(model, tmp_path, capsys, **SHAPE, **budgets)
    assert "the step time is unknown until `zo2trl plan` has measured this machine" in line
    assert [(u["name"], u["tier"], u["bytes"]) for u in plan["units"]] == units
    assert cli.main(["plan", str(model), "--store_dir", str(tmp_path), "--use_cpu", "--probe", "never"]) == 0
    assert "The step time is unknown" in capsys.readouterr().out
