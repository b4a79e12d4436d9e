"""Promises of an export: the trainer's own bytes, at any step, from whatever is sound, and nothing half done."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from tests.support.made_store import assert_same_files, files_in, make_run, saver, weights
from tests.support.models import NAMES, tiny_model
from tests.support.toys import Quadratic, toy
from zo2trl.checkpoints.export import export_store
from zo2trl.errors import UnsupportedError

TIERS = ("gpu", "cpu", "disk")


# -- the same bytes


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_exported_as_the_trainer_saves_it(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    tier = TIERS[NAMES.index(name) % 3]
    make_run(model, tmp_path / "store", tier=tier, each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_step_can_be_had_from_every_tier_and_dtype(tmp_path: Path, tier: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama-tied", dtype=dtype)
    steps = (0, 1, 2, 6, 7, 9)
    make_run(model, tmp_path / "store", tier=tier, steps=iter(steps), each=saver(model, tmp_path))
    for step in (*steps, 10):
        export_store(tmp_path / "store", tmp_path / f"out-{step}", step=step)
        assert_same_files(tmp_path / f"out-{step}", tmp_path / f"saved-{step}")
    assert weights(tmp_path / "out-0")["model.norm.weight"].dtype == dtype
    export_store(tmp_path / "store", tmp_path / "between", step=4)  # between the steps 2 and 6
    assert_same_files(tmp_path / "between", tmp_path / "saved-6")


@pytest.mark.parametrize("direction", ["gaussian", "mezo"])
def test_other_directions_are_repeated_too(tmp_path: Path, direction: str) -> None:
    model = tiny_model("opt")
    make_run(model, tmp_path / "store", tier="cpu", direction=direction, each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out", step=4)
    assert_same_files(tmp_path / "out", tmp_path / "saved-4")


def test_a_module_of_ones_own_is_saved_by_its_names_with_its_buffers(tmp_path: Path) -> None:
    model = Quadratic()
    make_run(model, tmp_path / "store", each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")
    assert "layers.0.c" in weights(tmp_path / "out")


def test_a_tied_module_of_ones_own_is_saved_once(tmp_path: Path) -> None:
    model = toy(tied=True)
    make_run(model, tmp_path / "store")
    export_store(tmp_path / "store", tmp_path / "out")
    assert set(weights(tmp_path / "out")) == {name for name, _ in model.named_parameters()}


class OwnModel(type(tiny_model("opt"))):  # type: ignore[misc]
    """A class that only this file knows."""


def test_a_transformers_model_of_a_class_of_ones_own_is_saved_by_its_names(tmp_path: Path) -> None:
    model = OwnModel(tiny_model("opt").config)
    make_run(model, tmp_path / "store", each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out")
    assert_weights_equal(tmp_path / "out", tmp_path / "saved-5")
    assert (tmp_path / "out" / "config.json").is_file()


def assert_weights_equal(made: Path, saved: Path) -> None:
    found, expected = weights(made), weights(saved)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_names_of_the_checkpoint_that_was_loaded_come_back(tmp_path: Path) -> None:
    tiny_model("roberta-mlm").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    old_names = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in load_file(file).items()}
    save_file(old_names, file, {"format": "pt"})
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    make_run(model, tmp_path / "store", each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")
    assert "roberta.encoder.layer.0.output.LayerNorm.gamma" in weights(tmp_path / "out")


def lora(model: PreTrainedModel, **choices: Any) -> nn.Module:
    made = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **choices))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return made


@pytest.mark.parametrize(
    "choices",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"task_type": "CAUSAL_LM", "use_rslora": True}],
    ids=["lora", "dora", "head", "causal"],
)
def test_an_adapter_is_exported_as_peft_saves_it(tmp_path: Path, choices: dict[str, Any]) -> None:
    model = lora(tiny_model("opt"), **choices)
    make_run(model, tmp_path / "store", each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out", step=3)
    assert_same_files(tmp_path / "out", tmp_path / "saved-3")


def test_two_adapters_are_saved_side_by_side(tmp_path: Path) -> None:
    model: Any = lora(tiny_model("opt"))
    model.add_adapter("other", LoraConfig(target_modules=["k_proj"], r=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    make_run(model, tmp_path / "store", each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")


def test_an_adapter_that_transformers_carries_is_saved_as_transformers_does(tmp_path: Path) -> None:
    model: Any = tiny_model("opt")
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2), adapter_name="mine")
    make_run(model, tmp_path / "store", each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out")
    assert_weights_equal(tmp_path / "out", tmp_path / "saved-5")


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_and_prefixes_are_exported_as_peft_saves_them(tmp_path: Path, kind: Any) -> None:
    model = get_peft_model(tiny_model("opt"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    make_run(model, tmp_path / "store", each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")


def test_an_adapter_that_is_computed_when_it_is_saved_needs_the_trainer(tmp_path: Path) -> None:
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
    make_run(get_peft_model(tiny_model("opt"), config), tmp_path / "store")
    with pytest.raises(UnsupportedError, match="save_model"):
        export_store(tmp_path / "store", tmp_path / "out")


def test_what_the_trainer_adds_to_the_model_folder_is_copied(tmp_path: Path) -> None:
    def describe(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("words")

    make_run(tiny_model("opt"), tmp_path / "store", describe=describe)
    export_store(tmp_path / "store", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "words"
    assert sorted(files_in(tmp_path / "out")) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
