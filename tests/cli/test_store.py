"""Promises of `zo2trl verify`, `export` and `log`: results on stdout, errors in one line, exit codes for scripts."""

import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

from tests.support.made_store import assert_same_files, files_in, flip, make_run, path_run, saver, unit_file
from tests.support.models import tiny_model
from tests.support.runs import closing, sft_trainer
from zo2trl import cli
from zo2trl.journal.journal import Journal, MarkKind
from zo2trl.trainers.resume.checkpoint import Pointer, commit_checkpoint

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "zo2trl.cli"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, a checkpoint of the first three beside it, and what the model was after each."""
    folder, model = tmp_path_factory.mktemp("run"), tiny_model("opt")
    make_run(model, folder / "store", each=saver(model, folder))
    with Journal.open(folder / "store" / "journal", read_only=True) as journal:
        store_id, fingerprint = str(journal.header["store"]), journal.fingerprint(3)
    (folder / "checkpoint-3").mkdir()
    pointer = Pointer(
        store="store", store_id=store_id, position=3, fingerprint=fingerprint, step=3, step_offset=0, counters={}
    )
    commit_checkpoint(folder / "checkpoint-3", pointer)
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


# -- verify


def test_a_sound_store_verifies_with_exit_code_0(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(run / "store")]) == 0
    assert capsys.readouterr().out == f"{run}/store is sound.\n"


def test_damage_is_listed_with_exit_code_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = unit_file(run / "store", "root")
    flip(file, 3)
    assert cli.main(["verify", str(run / "store")]) == 1
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith(f"damage: {file} at offset 0: unit root: model.decoder.embed_tokens.weight has CRC")
    assert summary == f"{run}/store: 1 damaged."


def test_notes_do_not_fail(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "store" / "units" / "draft@9").touch()
    assert cli.main(["verify", str(run / "store")]) == 0
    assert capsys.readouterr().out.endswith("is sound, 1 note.\n")


def test_no_store_is_an_error_and_not_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"zo2trl: error: {tmp_path} holds no store. Check the path.\n"


def test_the_folder_above_a_store_names_the_store(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["verify"], ["log"], ["export"]):
        assert cli.main([*command, str(run), *([str(run / "out")] if command == ["export"] else [])]) == 2
        assert f"Did you mean {run / 'store'}?" in capsys.readouterr().err


def test_a_checkpoint_is_verified_with_its_store(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(run / "checkpoint-3")]) == 0
    assert cli.main(["verify", str(run / "store"), "--checkpoint", str(run / "checkpoint-3")]) == 0
    with Journal.open(run / "store" / "journal", sync_every=0) as journal:
        journal.rewind(2)
    capsys.readouterr()
    assert cli.main(["verify", str(run / "store"), "--checkpoint", str(run / "checkpoint-3")]) == 1
    assert f"damage: {run}/checkpoint-3: " in capsys.readouterr().out


def test_the_base_model_is_verified_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = path_run(tmp_path)
    assert cli.main(["verify", str(store), "--base"]) == 0
    shutil.move(tmp_path / "base", tmp_path / "moved")
    assert cli.main(["verify", str(store), "--base"]) == 1
    assert cli.main(["verify", str(store), "--base", str(tmp_path / "moved")]) == 0


# -- export


def test_a_store_is_exported_at_its_end_and_at_any_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run / "store"), str(run / "out")]) == 0
    assert capsys.readouterr().out == f"Exported {run}/store to {run}/out.\n"
    assert_same_files(run / "out", run / "saved-5")
    assert cli.main(["export", str(run / "store"), str(run / "early"), "--step", "2"]) == 0
    assert_same_files(run / "early", run / "saved-2")


def test_a_checkpoint_is_exported_as_it_was(run: Path) -> None:
    assert cli.main(["export", str(run / "checkpoint-3"), str(run / "out")]) == 0
    assert_same_files(run / "out", run / "saved-3")


def test_a_checkpoint_whose_store_was_moved_is_told_where_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(run / "store", run / "elsewhere")
    assert cli.main(["export", str(run / "checkpoint-3"), str(run / "out")]) == 2
    assert "holds no store" in capsys.readouterr().err
    assert cli.main(["export", str(run / "checkpoint-3"), str(run / "out"), "--store", str(run / "elsewhere")]) == 0
    assert_same_files(run / "out", run / "saved-3")


def test_a_checkpoint_of_another_run_or_history_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tiny_model("opt"), tmp_path / "other")
    command = ["export", str(run / "checkpoint-3"), str(run / "out")]
    assert cli.main([*command, "--store", str(tmp_path / "other")]) == 2
    assert "another run" in capsys.readouterr().err
    with Journal.open(run / "store" / "journal", sync_every=0) as journal:
        journal.rewind(1)
    assert cli.main(command) == 2
    assert "does not hold the 3 records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "9"], "from 0 to 5"),
        (["--base", "nowhere/at-all"], ""),
        (["--device", "cuda"], "no such CUDA device"),
        (["--device", "foo"], "no device to replay"),
    ],
)
def test_what_cannot_be_exported_is_one_line_on_stderr(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code = cli.main(["export", str(run / "store"), str(run / "out"), *options])
    captured = capsys.readouterr()
    if options[0] == "--base":  # it is not needed, so it is not looked at
        assert code == 0
        return
    assert code == 2 and message in captured.err and captured.err.count("\n") == 1
    assert not (run / "out").exists()


def test_a_step_and_a_checkpoint_are_one_too_many(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run / "checkpoint-3"), str(run / "out"), "--step", "2"]) == 2
    assert "--step" in capsys.readouterr().err


# -- log


def test_the_log_is_a_table_of_the_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["log", str(run / "store")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "step loss projected gradient learning rate notes".split()
    steps = {line.split()[0]: line for line in lines[2:]}
    assert list(steps) == ["0", "1", "2", "3", "4"]
    assert "2.375000" in steps["1"] and "1.5 -0.25" in steps["1"] and "0.01" in steps["1"]
    assert "not finite" in steps["2"] and "skipped" in steps["2"]


def test_every_line_of_the_json_log_is_what_the_journal_has(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal.open(run / "store" / "journal", sync_every=0) as journal:
        journal.append_mark(MarkKind.SAVED, step=5)
        records = journal.records
    assert cli.main(["log", str(run / "store"), "--json"]) == 0
    rows = [json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines()]
    assert [row["step"] for row in rows] == [record.step for record in records]
    assert rows[3] == {
        "step": 3, "position": 4, "seed": 903, "loss": 2.375, "loss_plus": 2.5, "loss_minus": 2.25,
        "projected_grads": [3.5, -0.25], "grad_norm": 3.5, "learning_rate": 0.01, "weight_decay": 0.0,
        "zo_eps": 1e-3, "skipped": False, "marks": [],
    }  # fmt: skip
    assert rows[2]["skipped"] and rows[2]["loss"] is None and rows[2]["loss_minus"] == 1.0
    assert rows[4]["marks"] == ["saved"]


@pytest.mark.parametrize(("last", "steps"), [("2", [3, 4]), ("0", []), ("99", [0, 1, 2, 3, 4])])
def test_the_last_steps_can_be_asked_for(
    run: Path, last: str, steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["log", str(run / "store"), "--json", "--last", last]) == 0
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == steps


def test_a_long_log_is_one_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal.open(run / "store" / "journal", sync_every=0) as journal:
        step = journal.records[4]
        for number in range(5, 1205):
            journal.append(step._replace(step=number))
    assert cli.main(["log", str(run / "store")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [str(number) for number in range(1205)]
    assert len({line.index("0.01") for line in lines[7:]}) == 1, "columns stay in line"


def test_the_log_of_a_running_training_leaves_the_store_alone(run: Path) -> None:
    before = (run / "store" / "journal").read_bytes()
    with (run / "store" / "journal").open("r+b") as file:
        file.truncate(len(before) - 77)  # as a crash, or a write that is not finished, leaves it
    assert cli.main(["log", str(run / "store")]) == 0
    assert (run / "store" / "journal").read_bytes() == before[:-77]


def test_whoever_reads_the_log_may_stop(run: Path) -> None:
    with Journal.open(run / "store" / "journal", sync_every=0) as journal:
        step = journal.records[4]
        for number in range(5, 3000):
            journal.append(step._replace(step=number))
    log = shlex.join([*map(str, COMMAND), "log", str(run / "store"), "--json"])
    line = f"{log} | head -n 1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "0"
    assert ended.stderr == ""


# -- terminals and scripts


def test_a_script_sees_no_progress_and_a_person_does(run: Path) -> None:
    export = [*COMMAND, "export", str(run / "store")]
    ended = subprocess.run([*export, str(run / "one")], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    screen, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    watched = subprocess.Popen(
        [*export, str(run / "two")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while chunk := _read(screen):
        shown += chunk
    os.close(screen)
    assert watched.wait() == 0
    assert b"Exporting" in shown and b"100%" in shown


def _read(screen: int) -> bytes:
    try:
        return os.read(screen, 4096)
    except OSError:  # what a terminal says when its other end is closed
        return b""


def test_log_needs_no_torch(run: Path) -> None:
    script = f"import sys\nfrom zo2trl import cli\ncli.main(['log', '{run}/store'])\nprint('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "False"


def test_a_trained_adapter_is_exported_with_everything_the_trainer_saves(tmp_path: Path) -> None:
    adapter = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    trainer = sft_trainer(
        tmp_path, tiny_model("opt"), extra={"peft_config": adapter}, save_strategy="steps", save_steps=2, max_steps=3
    )
    with closing(trainer):
        trainer.train()
        trainer.save_model(tmp_path / "saved")
    for source, saved, out in (("store", "saved", "end"), ("checkpoint-2", "checkpoint-2", "middle")):
        assert cli.main(["export", str(tmp_path / source), str(tmp_path / out)]) == 0
        made = files_in(tmp_path / out)
        assert made.items() <= files_in(tmp_path / saved).items()
        assert set(made) >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert cli.main(["verify", str(tmp_path / "checkpoint-2")]) == 0
