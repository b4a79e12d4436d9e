"""S2: pickles that would act are never opened, and nothing in the package could open one."""

import ast
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig

from tests.support.hostile import malicious, malicious_archive
from tests.support.models import tiny_model, tiny_rows
from tests.support.processes import audited
from tests.support.runs import closing, sft_trainer, zo_trainer
from zo2trl.checkpoints.convert import convert_checkpoint
from zo2trl.checkpoints.load import load_mapped
from zo2trl.errors import CheckpointError, UnsupportedError
from zo2trl.trainers.resume import checkpoint
from zo2trl.trainers.resume.checkpoint import Pointer, commit_checkpoint, read_checkpoint

PACKAGE = Path(__file__).resolve().parents[2] / "zo2trl"
UPSTREAM_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin", "rng_state_0.pth")
PICKLED_WEIGHTS = ("pytorch_model.bin", "adapter_model.bin")
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that appears if a pickle is opened; also, no class may be looked up by any unpickler in the test."""
    path = tmp_path / "canary"
    with audited("pickle.find_class") as looked_up:
        yield path
    assert not path.exists(), "a pickle has acted"
    assert looked_up == []


def spoil(folder: Path, canary: Path, names: tuple[str, ...]) -> None:
    """Put malicious pickles into a folder: plain ones and torch's archives in turn, and an array of objects."""
    for index, name in enumerate(names):
        if index % 2:
            malicious_archive(canary, folder / name)
        else:
            (folder / name).write_bytes(malicious(canary))
    (folder / "extra.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', }".ljust(117) + b"\n" + malicious(canary)
    )


def test_the_pickles_of_these_tests_are_not_duds(tmp_path: Path) -> None:
    pickle.loads(malicious(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()
    malicious_archive(tmp_path / "other", tmp_path / "model.bin")
    with zipfile.ZipFile(tmp_path / "model.bin") as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert (tmp_path / "other").exists()


# -- model folders


def pickled_model(folder: Path, canary: Path) -> Path:
    tiny_model("llama").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    spoil(folder, canary, PICKLED_WEIGHTS)
    return folder


def test_pickled_weights_are_refused_with_the_way_out(canary: Path, tmp_path: Path) -> None:
    folder = pickled_model(tmp_path / "model", canary)
    for use in (load_mapped, lambda path: zo_trainer(tmp_path / "run", str(path), tiny_rows("llama", 4))):
        with pytest.raises(CheckpointError, match="zo2trl convert"):
            use(folder)


def test_an_index_of_pickles_is_no_way_in(canary: Path, tmp_path: Path) -> None:
    folder = pickled_model(tmp_path / "model", canary)
    for name in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (folder / name).write_text(json.dumps(index))
        with pytest.raises(CheckpointError):
            load_mapped(folder)


def test_a_pickle_under_the_name_of_safetensors_is_no_way_in(canary: Path, tmp_path: Path) -> None:
    folder = pickled_model(tmp_path / "model", canary)
    for name in PICKLED_WEIGHTS:
        shutil.copy(folder / name, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            load_mapped(folder)


def test_pickles_beside_safetensors_are_left_alone(canary: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model", canary, (*PICKLED_WEIGHTS, *UPSTREAM_STATE))
    load_mapped(tmp_path / "model")


def test_a_pickled_adapter_is_refused(canary: Path, tmp_path: Path) -> None:
    folder = pickled_model(tmp_path / "model", canary)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UnsupportedError, match="adapter"):
        load_mapped(folder)


@pytest.mark.parametrize(
    "make", [lambda c, p: p.write_bytes(malicious(c)), malicious_archive], ids=["plain", "archive"]
)
def test_converting_a_malicious_pickle_runs_nothing_and_leaves_nothing(
    make: Callable[[Path, Path], Any], canary: Path, tmp_path: Path
) -> None:
    folder = pickled_model(tmp_path / "model", canary)
    make(canary, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        convert_checkpoint(folder, tmp_path / "converted")
    assert not list(tmp_path.glob("converted*"))


# -- checkpoints


def test_an_upstream_checkpoint_is_refused(canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-2"
    tiny_model("llama").save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    spoil(folder, canary, (*UPSTREAM_STATE, *PICKLED_WEIGHTS))
    with (
        closing(zo_trainer(tmp_path / "run", tiny_model("llama"), tiny_rows("llama", 4))) as trainer,
        pytest.raises(CheckpointError, match="pass it as `model`"),
    ):
        trainer.train(resume_from_checkpoint=str(folder))


def recommit(folder: Path) -> None:
    """As somebody would who gives away a checkpoint of this package with things added."""
    found = read_checkpoint(folder)
    commit_checkpoint(folder, Pointer(**{name: getattr(found, name) for name in Pointer.__dataclass_fields__}))


def test_pickles_in_a_checkpoint_of_this_package_are_left_alone(canary: Path, tmp_path: Path) -> None:
    rows = tiny_rows("llama", 4)
    with closing(zo_trainer(tmp_path, tiny_model("llama"), rows, **SAVING)) as trainer:
        trainer.train()
    spoil(tmp_path / "checkpoint-1", canary, (*UPSTREAM_STATE, *PICKLED_WEIGHTS))
    recommit(tmp_path / "checkpoint-1")
    with closing(zo_trainer(tmp_path, tiny_model("llama"), rows, **{**SAVING, "max_steps": 3})) as trainer:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert trainer.state.global_step == 3


def lora(folder: Path, **options: Any) -> Any:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return sft_trainer(folder, tiny_model("llama"), extra={"peft_config": adapter}, **{**SAVING, **options})


@pytest.mark.parametrize("where", ["beside the adapter", "in a folder", "alone"])
def test_upstream_finds_no_pickle_in_an_adapters_checkpoint(where: str, canary: Path, tmp_path: Path) -> None:
    """Without the store, upstream's own code takes adapters from a checkpoint, and it takes pickles where it can."""
    with closing(lora(tmp_path / "run")) as trainer:
        trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    shutil.rmtree(tmp_path / "run" / "store")
    assert (folder / "adapter_model.safetensors").exists()
    if where == "in a folder":
        (folder / "other").mkdir()
        shutil.copy(folder / "adapter_config.json", folder / "other")
    if where == "alone":
        (folder / "adapter_model.safetensors").unlink()
        (folder / checkpoint.MARKER_NAME).write_text(marker_without(folder, "adapter_model.safetensors"))
    spoil(folder / "other" if where == "in a folder" else folder, canary, PICKLED_WEIGHTS)
    recommit(folder)
    with closing(lora(tmp_path / "run")) as trainer, pytest.raises(CheckpointError):
        trainer.train(resume_from_checkpoint=str(folder))


def marker_without(folder: Path, name: str) -> str:
    marker = json.loads((folder / checkpoint.MARKER_NAME).read_text())
    del marker["files"][name], marker["crc32"]
    return json.dumps(marker | {"crc32": checkpoint._crc_of(marker)})


def test_a_checkpoint_holds_no_pickle_itself(tmp_path: Path) -> None:
    with closing(lora(tmp_path, save_full_weights=True)) as trainer:
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
    found = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert not found & {".bin", ".pt", ".pth", ".pkl"}, sorted(tmp_path.rglob("*"))


# -- the package itself

DANGEROUS_CALLS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
                   "torch.jit.load", "torch.hub.load", "torch.package", "torch.save", "np.load", "numpy.load",
                   "importlib.import_module", "subprocess", "runpy")  # fmt: skip
DANGEROUS_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml",
                     "subprocess", "runpy", "code", "ctypes")  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    "checkpoints/convert.py": {"torch.load"},
    "files/malloc_trim.py": {"ctypes"},  # one function of the C library, by its name, with a constant
    "cli/training.py": {"subprocess"},  # names the error of accelerate's launcher
    "trainers/scripts.py": {"yaml"},  # names the parser's error; TRL's parser reads the file, safely
}


def dangers(source: str) -> Iterator[str]:
    """What in a module could run code that comes with data."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                yield "torch.load" if safe else "torch.load without weights_only"
            elif name in DANGEROUS_CALLS or name.startswith(tuple(f"{call}." for call in DANGEROUS_CALLS)):
                yield name
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" or (
                    keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) == "True"
                ):
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in DANGEROUS_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in DANGEROUS_MODULES:
            yield str(node.module)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_in_the_package_could_run_code_from_data(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(PACKAGE).as_posix(), set())
    assert set(dangers(path.read_text())) - allowed == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch.load(p)", "torch.load without weights_only"),
        ("torch.load(p, weights_only=False)", "torch.load without weights_only"),
        ("import pickle", "pickle"),
        ("def f():\n    from dill import loads", "dill"),
        ("eval(text)", "eval"),
        ("yaml.load(text)", "yaml.load"),
        ("np.load(path)", "np.load"),
        ("load(path, allow_pickle=True)", "allow_pickle=True"),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", "trust_remote_code=True"),
        ("subprocess.run(text)", "subprocess.run"),
        ("model.eval()", None),
        ("re.compile(x)", None),
    ],
)
def test_the_rule_sees_what_it_forbids(source: str, found: str | None) -> None:
    assert list(dangers(source)) == ([found] if found else [])


def test_numpy_itself_refuses_the_array_of_objects(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "a.npy")
