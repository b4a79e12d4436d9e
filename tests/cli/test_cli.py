import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from zo2trl import cli

ROOT = Path(__file__).resolve().parents[2]


def test_convert_makes_a_folder_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 64}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32))
    source, made = tmp_path / "source", tmp_path / "made"
    model.config.save_pretrained(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    assert cli.main(["convert", str(source), str(made)]) == 0
    assert capsys.readouterr().out == f"Converted {source} to {made}.\n"
    converted = OPTForCausalLM.from_pretrained(made).state_dict()
    assert all(torch.equal(converted[name], tensor) for name, tensor in model.state_dict().items())


def test_an_error_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "made")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"zo2trl: error: {tmp_path}/nowhere is not a folder. Check the path.\n"


def test_the_command_itself_exits_with_2_and_shows_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zo2trl.cli", "convert", str(tmp_path), str(tmp_path / "made")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "nothing to convert" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, destination: Path) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("zo2trl.checkpoints.convert.convert_checkpoint", fail)
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["convert", "a", "b"])


def test_env_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for package in ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy", "safetensors"):
        assert lines[package] == version(package)
    assert {"zo2trl", "Python", "CUDA", "CPU", "memory", "disk", "accelerate config"} <= set(lines)
    assert "available" in lines["memory"] and "free at" in lines["disk"]


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("zo2trl ")


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["convert", "only-one"]])
def test_bad_usage_exits_with_2_and_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: zo2trl" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    script = "import sys\nfrom zo2trl import cli\ncli._parser().format_help()\nprint('torch' in sys.modules)"
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
