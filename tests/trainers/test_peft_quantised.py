"""Adapters on bases that transformers has quantised train in fp32 and resume, and the base is not moved."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from tests.support.adapters import ADAPTERS, StopAt, adapted, trainable_names
from tests.support.models import SPECIAL, VOCABULARY, tiny_batch, tiny_rows
from tests.support.runs import STREAMED_FROM_DISK, closing, sft_trainer, zo_trainer
from tests.support.tokenizer import tiny_tokenizer
from zo2trl.errors import BudgetError, ConfigError, UnsupportedError
from zo2trl.layout.quantised import quantised_parameters

OPTIONS: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 3, **STREAMED_FROM_DISK}


def four_bit() -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def eight_bit() -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8() -> Any:
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


EVERY_KIND = pytest.mark.parametrize(
    "quantisation", [four_bit, eight_bit, torchao_int8], ids=lambda make: make.__name__
)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """Make a bf16 checkpoint with rows that are a whole number of bitsandbytes' blocks long."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **SPECIAL, vocab_size=VOCABULARY, max_position_embeddings=64))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def by_config(folder: Path, base: str, config: Any, *, kind: str = "lora", **options: Any) -> Any:
    extra = {"peft_config": ADAPTERS[kind](), "quantization_config": config, "callbacks": options.pop("callbacks", [])}
    return sft_trainer(folder, base, extra=extra, **{**OPTIONS, **options})


def ready(folder: Path, base: str, config: Any, *, kind: str = "lora", **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    return zo_trainer(folder, adapted(model, kind), tiny_rows("llama", 6), **{**OPTIONS, **options})


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logits_of(model: Any) -> torch.Tensor:
    batch = tiny_batch("llama")
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@EVERY_KIND
@pytest.mark.parametrize("make", [by_config, ready])
def test_an_adapter_on_a_quantised_base_trains_and_reloads(
    make: Callable[..., Any], quantisation: Callable[[], Any], base: str, tmp_path: Path, caplog: Any
) -> None:
    config = quantisation()
    with caplog.at_level(logging.WARNING), closing(make(tmp_path / "run", base, config)) as trainer:
        quantised = {name: p.detach().clone() for name, p in quantised_parameters(trainer.model).items()}
        before = trained_weights(trainer.model)
        assert sorted(before) == trainable_names(trainer.model) and len(quantised) == 14
        trainer.train()
        after = trained_weights(trainer.model)
        assert all(not torch.equal(before[name], after[name]) for name in before)
        assert {value.dtype for value in after.values()} == {torch.float32}
        for name, parameter in quantised_parameters(trainer.model).items():
            assert (
                torch.equal(parameter.detach().dequantize(), quantised[name].dequantize())
                if hasattr(parameter, "qdata")
                else torch.equal(parameter, quantised[name])
            )
        names = {spec.name for unit in trainer.engine.store.layout.units for spec in unit.tensors}
        assert names.isdisjoint(quantised)
        trainer.save_model(str(tmp_path / "adapter"))
        expected = logits_of(trainer.model)
    assert sum("not streamed" in record.getMessage() for record in caplog.records) == 1
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    reloaded = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    # bitsandbytes has two ways to multiply 4-bit weights on a CPU, and a plain model takes the other one.
    assert torch.allclose(logits_of(reloaded).float(), expected.float(), atol=0.02 if quantisation is four_bit else 0)


@EVERY_KIND
def test_a_run_on_a_quantised_base_resumes_bit_for_bit(
    quantisation: Callable[[], Any], base: str, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    with closing(by_config(tmp_path / "straight", base, quantisation())) as trainer:
        trainer.train()
        expected = trained_weights(trainer.model)
    with closing(by_config(tmp_path / "run", base, quantisation(), callbacks=[StopAt(2)], **saving)) as trainer:
        trainer.train()
    with closing(by_config(tmp_path / "run", base, quantisation(), **saving)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        found = trained_weights(trainer.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@EVERY_KIND
def test_full_fine_tuning_of_a_quantised_base_is_refused_with_the_way_out(
    quantisation: Callable[[], Any], base: str, tmp_path: Path
) -> None:
    extra = {"quantization_config": quantisation()}
    with pytest.raises(UnsupportedError, match=r"is quantised.*peft_config=LoraConfig.*without `quantization_config`"):
        sft_trainer(tmp_path / "run", base, extra=extra)
    with pytest.raises(UnsupportedError, match=r"is quantised.*peft_config=LoraConfig.*without `quantization_config`"):
        sft_trainer(tmp_path / "run", base, model_init_kwargs=extra)
    model = AutoModelForCausalLM.from_pretrained(base, **extra)
    with pytest.raises(UnsupportedError, match=r"is quantised.*peft_config=LoraConfig.*without `quantization_config`"):
        zo_trainer(tmp_path / "run", model, tiny_rows("llama", 6))


def test_a_quantised_checkpoint_is_one_without_being_told(base: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base, quantization_config=eight_bit()).save_pretrained(tmp_path / "int8")
    tiny_tokenizer().save_pretrained(tmp_path / "int8")
    with closing(by_config(tmp_path / "run", str(tmp_path / "int8"), None)) as trainer:
        assert len(quantised_parameters(trainer.model)) == 14
        trainer.train()
    with pytest.raises(UnsupportedError, match="Train an adapter on it"):
        sft_trainer(tmp_path / "other", str(tmp_path / "int8"))


def test_a_quantisation_given_twice_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`quantization_config` was given to the trainer and in `model_init_kwargs`"
    ):
        by_config(tmp_path, base, eight_bit(), model_init_kwargs={"quantization_config": eight_bit()})


def test_quantised_weights_count_against_the_device_budget(base: str, tmp_path: Path) -> None:
    with closing(by_config(tmp_path / "fits", base, eight_bit(), device_memory=400_000, granularity="block")):
        pass
    with pytest.raises(BudgetError, match=r"The quantised base takes 81,920 bytes of the device beside these\."):
        by_config(tmp_path / "does not", base, eight_bit(), device_memory=300_000, granularity="block")
