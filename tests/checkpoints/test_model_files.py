"""Promises of a store's model folder: it says what a model is, and nothing in it is run, followed or believed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tests.support.models import NAMES, tiny_model
from tests.support.toys import Quadratic
from zo2trl.checkpoints.model_files import ModelFiles, describe_model, fill
from zo2trl.errors import StoreCorrupt, ZO2TRLError
from zo2trl.layout.layout import TensorSpec
from zo2trl.layout.model_layout import plan_layout


def specs_of(model: torch.nn.Module) -> list[TensorSpec]:
    return [spec for unit in plan_layout(model).units for spec in unit.tensors]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def changed(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", NAMES)
def test_a_skeleton_has_the_names_and_ties_of_the_model_and_no_storage(folder: Path, name: str) -> None:
    model = tiny_model(name)
    describe_model(model, folder)
    skeleton = ModelFiles.read(folder).skeleton(specs_of(model))
    assert skeleton is not None
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert [n for n, _ in skeleton.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert skeleton.state_dict().keys() == model.state_dict().keys()


def test_a_filled_skeleton_is_the_model(folder: Path) -> None:
    model: Any = tiny_model("llama-tied")
    describe_model(model, folder)
    skeleton: Any = ModelFiles.read(folder).skeleton(specs_of(model))
    fill(skeleton, dict(model.named_parameters()) | ModelFiles.read(folder).buffers())
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in skeleton.state_dict().items())


def test_describing_leaves_the_model_as_it_was(folder: Path) -> None:
    model = get_peft_model(tiny_model("opt"), LoraConfig(target_modules=["q_proj"]))
    before = str(model.peft_config), model.config.to_json_string(), list(model.state_dict())
    describe_model(model, folder)
    assert before == (str(model.peft_config), model.config.to_json_string(), list(model.state_dict()))


def test_buffers_are_copies_as_they_were(folder: Path) -> None:
    model = Quadratic()
    describe_model(model, folder)
    before = model.first.c.clone()
    model.first.c.zero_()
    assert torch.equal(ModelFiles.read(folder).buffers()["first.c"], before)


# -- what somebody else may have written


@pytest.mark.parametrize(
    ("named", "module"),
    [
        ("system", "os"),
        ("OPTForCausalLM", "somewhere.else"),
        ("pipeline", "transformers.pipelines"),
        ("Trainer", "transformers.trainer"),
        ("OPTConfig", "transformers.models.opt.configuration_opt"),
        ("__name__", "transformers."),
        ("GPT2LMHeadModel", "transformers.models.opt.modeling_opt"),
    ],
)
def test_only_a_model_class_of_transformers_is_ever_made(folder: Path, named: str, module: str) -> None:
    describe_model(tiny_model("opt"), folder)
    changed(folder / "model_class.json", **{"class": named, "module": module})
    assert ModelFiles.read(folder).skeleton(specs_of(tiny_model("opt"))) is None


def test_code_that_a_configuration_points_to_is_not_run(folder: Path) -> None:
    describe_model(tiny_model("opt"), folder)
    (folder / "evil.py").write_text("raise SystemExit('run')")
    changed(
        folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        attn_implementation="somebody/kernel", _attn_implementation="somebody/kernel",
    )  # fmt: skip
    assert isinstance(ModelFiles.read(folder).skeleton(specs_of(tiny_model("opt"))), PreTrainedModel)


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 2}, {"class": 7}, {"module": None}, {"adapters": []}, {"adapters": {"": {"a": 1}}},
        {"adapters": {"../out": {}}}, {"adapters": {"/tmp": {}}}, {"adapters": {"a/../../b": None}},
        {"conversions": "all"},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_that_cannot_be_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    describe_model(tiny_model("opt"), folder)
    changed(folder / "model_class.json", **fields)
    with pytest.raises(StoreCorrupt, match=r"Restore|zo2trl that wrote it|not a safe file name"):
        ModelFiles.read(folder)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "activation_function"])
@pytest.mark.parametrize("value", [None, -1, 0, "x", [], {}, 1.5, 10**20])
def test_a_configuration_that_cannot_be_is_refused_or_another_model(folder: Path, field: str, value: Any) -> None:
    describe_model(tiny_model("opt"), folder)
    changed(folder / "config.json", **{field: value})
    try:
        assert ModelFiles.read(folder).skeleton(specs_of(tiny_model("opt"))) is None
    except ZO2TRLError as error:
        assert "config.json" in str(error)


def test_buffers_that_are_no_safetensors_are_refused(folder: Path) -> None:
    describe_model(Quadratic(), folder)
    (folder / "buffers.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(StoreCorrupt, match="safetensors"):
        ModelFiles.read(folder).buffers()
