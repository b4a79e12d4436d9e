"""`zo2trl sft|dpo|reward`: TRL's conventions, our trainers."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.models import tiny_model
from tests.support.tokenizer import tiny_tokenizer
from zo2trl import cli
from zo2trl.cli import training
from zo2trl.trainers import scripts

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [("the film was", " good"), ("the plot was", " bad"), ("the cast was", " good"), ("the score was", " bad")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_file(folder: Path, model: Path, rows: list[dict[str, str]], **more: Any) -> Path:
    data = folder / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    file = folder / "config.yaml"
    options = {
        "model_name_or_path": str(model), "output_dir": str(folder / "out"), "max_steps": 5, "logging_steps": 1,
        "datasets": [{"path": "json", "data_files": str(data)}], "per_device_train_batch_size": 2,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "device_memory": "min",
    }  # fmt: skip
    file.write_text(yaml.safe_dump({**options, **more}))
    return file


def completions() -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]


def preferences() -> list[dict[str, str]]:
    return [{"prompt": p, "chosen": f" good {c}", "rejected": f" bad {c}"} for p, c in PAIRS]


def run_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "zo2trl", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `accelerate launch` was asked to do, instead of doing it."""
    seen: list[Any] = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    return seen


def test_sft_trains_with_a_config_file_and_the_command_line_wins(tmp_path: Path, model: Path) -> None:
    file = config_file(
        tmp_path, model, completions(), env={"ZO2TRL_TEST_WORD": "seen"}, num_processes=1, num_machines=1,
        mixed_precision="no", dynamo_backend="no",
    )  # fmt: skip
    ended = run_command(
        "sft", "--config", str(file), "--max_steps", "2", "--use_peft", "--lora_r", "2", "--save_steps", "2",
        "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "1e-3", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Training completed." in ended.stdout
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["r"] == 2 and set(adapter["target_modules"]) == {"q_proj", "v_proj"}
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["max_steps"] == 2
    assert state["log_history"][0]["learning_rate"] == 1e-3 and "zo/projected_grad" in state["log_history"][0]


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_preferences_are_trained_on_by_the_other_commands(name: str, tmp_path: Path, model: Path) -> None:
    file = config_file(tmp_path, model, preferences(), save_strategy="no")
    scripts.main(name, ["--config", str(file), "--max_steps", "2"])
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_what_a_script_does_not_know_goes_to_accelerate(tmp_path: Path, model: Path, launched: list[Any]) -> None:
    file = config_file(tmp_path, model, completions(), num_processes=2, multi_gpu=True, debug=False)
    code = cli.main(["sft", "--config", str(file), "--main_process_port", "1234", "--lora_r", "4", "--use_peft"])
    assert code == 0
    (asked,) = launched
    assert (asked.num_processes, asked.main_process_port, asked.multi_gpu) == (2, 1234, True)
    assert asked.module and asked.training_script == "zo2trl.trainers.scripts"
    assert asked.training_script_args == ["sft", "--config", str(file), "--lora_r", "4", "--use_peft"]


def test_accelerate_configs_are_named_or_given_as_files(tmp_path: Path) -> None:
    ours = tmp_path / "mine.yaml"
    ours.write_text("distributed_type: 'NO'\n")
    assert training.with_config_file(["--x", "1", "--accelerate_config", str(ours)]) == [
        "--config_file", str(ours), "--x", "1",
    ]  # fmt: skip
    for name in [*training.bundled_configs(), "multi_gpu"]:
        option, path = training.with_config_file(["--accelerate_config", name])
        assert option == "--config_file" and Path(path).is_file()


def test_configs_in_the_recipes_are_found_by_name_and_come_first() -> None:
    ours = sorted(file.stem for file in (ROOT / "recipes" / "accelerate").glob("*.yaml"))
    assert {"one_gpu", "several_gpus", "cpu"} <= set(ours)
    assert list(training.bundled_configs())[: len(ours)] == ours


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config"], "`--config` needs the path"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--device_memry", "8GB"], "Did you mean `--device_memory`?"),
        (["--zo_eps", "-1"], "`zo_eps` is -1.0"),
        (["--accelerate_config", "one_gpus"], "is no file"),
        (["--accelerate_config"], "needs a name"),
        (["--load_in_8bit", "--load_in_4bit"], "8 bit and 4 bit"),
        (["b.yaml"], "Did you mean `--config b.yaml`?"),
        (["--use_cpu", "--num_processes", "2", "victim.py", "--cpu"], "`victim.py` belongs to no option"),
        (["--num_processes=1", "victim.py"], "`victim.py` belongs to no option"),
        (["--", "victim.py"], "`--` is an argument of neither"),
        (["--max_st", "3"], "`--max_st` is an argument of neither"),
        (["--num_proc", "2"], "`--num_proc` is an argument of neither"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--accelerate_config=one_gpus"], "is no file"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_starts(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], launched: list[Any]
) -> None:
    assert cli.main(["sft", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("zo2trl: error: ") and told.count("\n") == 1 and said in told
    assert not launched


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_name_or_path": "/nowhere"}, "/nowhere"),
        ({"dataset_train_split": "trian"}, "`dataset_train_split` is 'trian', and the data set has 'train'"),
        ({"datasets": []}, "No data set was named"),
        ({"datasets": [{"path": "json", "data_files": "/nowhere.jsonl"}]}, "`datasets` cannot be loaded"),
        ({"device_memory": "1kB"}, "cannot hold one step"),
        ({"devcie_memory": "1kB"}, "Did you mean `--device_memory`?"),
        ({"num_processes": 2}, "`--num_processes` is an argument of `accelerate launch`"),
        ({"use_peft": True, "lora_target_modules": ["nonsense"]}, "`lora_target_modules` nonsense"),
        ({"use_peft": True, "lora_r": 0}, "`lora_r` 0"),
    ],
)
def test_what_a_training_refuses_is_one_line(
    change: dict[str, Any], said: str, tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = config_file(tmp_path, model, completions(), **change)
    with pytest.raises(SystemExit) as ended:
        scripts.main("sft", ["--config", str(file)])
    assert ended.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("sft: error: ") and said in line


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_a_recipe_refuses_a_key_that_nobody_reads(
    name: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file(tmp_path, model, preferences(), devcie_memory="1kB")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--config", str(file)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    assert "Did you mean `--device_memory`?" in capsys.readouterr().err


def test_a_script_refuses_what_stands_before_any_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scripts.main("sft", ["b.yaml"])
    assert "Did you mean `--config b.yaml`?" in capsys.readouterr().err


def test_accelerates_keys_in_the_file_pass_where_the_command_has_read_them(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "accelerate.commands.launch.launch_command",
        lambda asked: scripts.main(asked.training_script_args[0], asked.training_script_args[1:]),
    )
    monkeypatch.setattr(scripts, "train", lambda name, *parsed: seen.append(name))
    file = config_file(tmp_path, model, completions(), num_processes=1)
    assert cli.main(["sft", f"--config={file}"]) == 0
    assert seen == ["sft"] and scripts.CHECKED not in os.environ


def test_accelerates_cpu_and_arguments_with_an_equals_sign_are_taken(
    tmp_path: Path, model: Path, launched: list[Any]
) -> None:
    file = config_file(tmp_path, model, completions())
    assert cli.main(["sft", f"--config={file}", "--cpu", "--accelerate_config=cpu", "--cpu_memory", "1GB"]) == 0
    (asked,) = launched
    assert asked.cpu and Path(asked.config_file).name == "cpu.yaml"
    assert asked.training_script_args == ["sft", f"--config={file}", "--cpu_memory", "1GB"]


def test_a_flag_of_accelerate_in_the_file_is_true_or_false(
    tmp_path: Path, model: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sft", "--config", str(config_file(tmp_path, model, completions(), multi_gpu="maybe"))]) == 2
    assert "`multi_gpu` is 'maybe' in the `--config` file" in capsys.readouterr().err and not launched


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="with several GPUs, several processes are started")
def test_several_processes_that_will_be_one_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("accelerate.commands.config.default_config_file", "/nowhere")
    for more in ([], ["--cpu"], ["--accelerate_config", "cpu"]):
        assert cli.main(["sft", "--use_cpu", "--num_processes", "2", *more]) == 0
        told = capsys.readouterr().err
        assert told.startswith("zo2trl: warning: `num_processes` is 2") and told.count("\n") == 1
    for quiet in (["--num_processes", "1"], ["--num_processes", "2", "--accelerate_config", "several_gpus"]):
        assert cli.main(["sft", "--use_cpu", *quiet]) == 0
        assert capsys.readouterr().err == ""


def test_resuming_is_asked_for_with_true_on_the_command_line(tmp_path: Path, model: Path) -> None:
    file = config_file(tmp_path, model, completions(), output_dir=str(tmp_path / "run"), save_steps=2)
    scripts.main("sft", ["--config", str(file), "--max_steps", "2"])
    scripts.main("sft", ["--config", str(file), "--max_steps", "4", "--resume_from_checkpoint", "true"])
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3, 4]
    scripts.main("sft", ["--config", str(file), "--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint",
                         "false", "--max_steps", "1"])  # fmt: skip


def test_adapters_of_a_reward_model_need_no_task_type(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file(tmp_path, model, preferences(), save_strategy="no", use_peft=True)
    scripts.main("reward", ["--config", str(file), "--max_steps", "1"])
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS" and "score" in adapter["modules_to_save"]
    with pytest.raises(SystemExit):
        scripts.main("reward", ["--config", str(file), "--lora_task_type", "CAUSAL_LM"])
    assert "`lora_task_type` is 'CAUSAL_LM'" in capsys.readouterr().err


def test_what_is_ignored_is_said(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = config_file(tmp_path, model, completions(), save_strategy="no")
    more = ["--max_steps", "1", "--dataset_name", "foo/bar", "--ignore_bias_buffers"]
    scripts.main("sft", ["--config", str(file), *more])
    assert "`dataset_name` foo/bar is ignored" in caplog.text
    assert "`ignore_bias_buffers` has no effect" in caplog.text


@pytest.mark.parametrize(("ended_with", "code"), [(2, 2), (1, 1), (-signal.SIGKILL, 137)])
def test_the_command_ends_with_the_code_of_the_training(
    ended_with: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(asked: Any) -> None:
        raise subprocess.CalledProcessError(ended_with, ["python"])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    assert cli.main(["sft", "--use_cpu"]) == code
    assert capsys.readouterr().err == ""  # the training has said why


def test_who_ends_the_command_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(asked: Any) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        os.kill(os.getpid(), signal.SIGTERM)
        raise subprocess.CalledProcessError(child.wait(timeout=300), ["python"])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["sft", "--use_cpu"]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the CPU's threads do not matter")
def test_one_process_without_a_gpu_computes_with_all_cores(
    monkeypatch: pytest.MonkeyPatch, launched: list[Any]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("accelerate.commands.config.default_config_file", "/nowhere")
    assert cli.main(["sft", "--use_cpu"]) == cli.main(["sft", "--use_cpu", "--num_processes", "2"]) == 0
    alone, two = launched
    assert alone.num_cpu_threads_per_process == torch.get_num_threads() and two.num_cpu_threads_per_process is None


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_a_recipe_tells_what_is_wrong_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--zo_eps", "-1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"{name}: error: `zo_eps` is -1.0")


def test_without_a_dtype_the_checkpoints_own_is_kept() -> None:
    _, args, model_args, _ = scripts.make_parser("sft").parse_args_and_config(["--use_cpu"])
    assert "dtype" not in scripts.model_init_kwargs(args, model_args)
    _, args, model_args, _ = scripts.make_parser("sft").parse_args_and_config(["--use_cpu", "--dtype", "float32"])
    assert scripts.model_init_kwargs(args, model_args)["dtype"] == "float32"
