"""Every kind of adapter trains as any model does, is saved as a standard PEFT folder, and does not change the base."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.adapters import ADAPTERS, FUSED, KINDS, StopAt, adapted, saved_base, trainable_names
from tests.support.models import tiny_batch, tiny_model, tiny_rows
from tests.support.runs import STREAMED_FROM_DISK, closing, differing, sft_trainer, step_logs, weights_of, zo_trainer

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
IN_A_HURRY = ("lora", "vera", "target parameters", "modules to save", "prefix tuning", "p-tuning")
SOME_AT_NIGHT = pytest.mark.parametrize(
    "kind", [kind if kind in IN_A_HURRY else pytest.param(kind, marks=pytest.mark.nightly) for kind in KINDS]
)
OPTIONS: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 3, **STREAMED_FROM_DISK}


def hashes(folder: str | Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def logits_of(model: Any) -> torch.Tensor:
    batch = tiny_batch("llama")
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def by_config(folder: Path, base: str, kind: str, **options: Any) -> Any:
    """Return a checkpoint's path and a `peft_config`."""
    callbacks = options.pop("callbacks", [])
    extra = {"peft_config": ADAPTERS[kind](), "callbacks": callbacks}
    return sft_trainer(folder, base, extra=extra, **{**OPTIONS, **options})


def sft_ready(folder: Path, base: str, kind: str, **options: Any) -> Any:
    """Make a PeftModel, as a user would, around a model that is mapped from its checkpoint."""
    return sft_trainer(folder, adapted(AutoModelForCausalLM.from_pretrained(base), kind), **{**OPTIONS, **options})


def zo_ready(folder: Path, base: str, kind: str, **options: Any) -> Any:
    """Make the same for a ZOTrainer."""
    model = adapted(AutoModelForCausalLM.from_pretrained(base), kind)
    return zo_trainer(folder, model, tiny_rows("llama", 6), **{**OPTIONS, **options})


def train_and_check(trainer: Any, base: str, folder: Path, *, kind: str) -> dict[str, torch.Tensor]:
    """Train, save and reload; return the final weights."""
    hashes_before = hashes(base)
    before, trainable = weights_of(trainer.model), trainable_names(trainer.model)
    trainer.engine.flush()
    founded = bytes_in(folder / "run" / "store" / "units")
    trainer.train()
    store = trainer.engine.store
    assert sorted(differing(weights_of(trainer.model), before)) == trainable
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert all(log["zo/bytes_disk_written"] == 0 for log in step_logs(trainer))
    assert bytes_in(folder / "run" / "store" / "units") == founded
    for unit in store.layout.units:
        assert len({spec.trainable for spec in unit.tensors}) == 1
        assert (store.tier_of(unit) == "disk") == (unit.kind == "block" and not unit.is_trained)
        is_copied = unit.is_trained or (kind in FUSED and unit.kind == "block")
        assert bool(store.residency.files.versions(unit)) == is_copied, (
            "the adapter's beginning is kept, the base is not"
        )
    trainer.save_model(str(folder / "adapter"))
    expected = logits_of(trainer.model)
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert not any(name.startswith("model") for name in files)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder / "adapter"))
    assert torch.equal(logits_of(reloaded), expected)
    assert not torch.equal(expected, logits_of(AutoModelForCausalLM.from_pretrained(base)))
    assert hashes(base) == hashes_before
    return weights_of(trainer.model)


@SOME_AT_NIGHT
def test_an_adapter_on_a_checkpoint_trains_reloads_and_resumes_and_the_base_is_only_read(
    kind: str, tmp_path: Path
) -> None:
    base = saved_base(tmp_path / "base", kind)
    with closing(by_config(tmp_path / "run", base, kind)) as trainer:
        expected = train_and_check(trainer, base, tmp_path, kind=kind)
    saving = {"save_strategy": "steps", "save_steps": 2}
    with closing(by_config(tmp_path / "other", base, kind, callbacks=[StopAt(2)], **saving)) as trainer:
        trainer.train()
    with closing(by_config(tmp_path / "other", base, kind, seed=42, **saving)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3
        assert differing(weights_of(trainer.model), expected) == []


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.nightly) if kind in IN_A_HURRY[2:] else kind for kind in KINDS]
)
def test_a_ready_peft_model_trains_as_well(kind: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", kind)
    with closing(zo_ready(tmp_path / "run", base, kind)) as trainer:
        train_and_check(trainer, base, tmp_path, kind=kind)


@pytest.mark.parametrize("kind", ["lora", "modules to save", "target parameters", "prefix tuning"])
def test_a_ready_peft_model_trains_with_trls_trainer(kind: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", kind)
    with closing(sft_ready(tmp_path / "run", base, kind)) as trainer:
        train_and_check(trainer, base, tmp_path, kind=kind)


# -- what an adapter's dtype and its neighbours are


@pytest.mark.parametrize("kind", ["lora", "prompt tuning", "ln tuning", "modules to save", "trainable tokens"])
@pytest.mark.parametrize("make", [by_config, zo_ready])
def test_adapters_of_a_bf16_base_train_in_fp32(make: Any, kind: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", kind, dtype=torch.bfloat16)
    with closing(make(tmp_path / "run", base, kind)) as trainer:
        before = weights_of(trainer.model)
        trainer.train()
        assert sorted(differing(weights_of(trainer.model), before)) == trainable_names(trainer.model)
        dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}
        trainer.save_model(str(tmp_path / "adapter"))
        expected = logits_of(trainer.model)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    # PEFT keeps whole modules that it trains in the base's dtype, and so rounds what it loads into them.
    is_rounded = kind in ("ln tuning", "modules to save")
    assert torch.allclose(logits_of(reloaded).float(), expected.float(), atol=0.02 if is_rounded else 0.0)


@pytest.mark.parametrize("kind", ["ln tuning", "modules to save"])
def test_a_base_that_is_cast_while_it_is_loaded_fits_the_modules_trained_beside_it(kind: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", kind)
    with closing(by_config(tmp_path / "run", base, kind, model_init_kwargs={"dtype": "bfloat16"})) as trainer:
        trainer.train()
        dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_adapters_made_in_16_bit_by_choice_stay_so(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model = get_peft_model(model, ADAPTERS["modules to save"](), autocast_adapter_dtype=False)
    with closing(zo_trainer(tmp_path, model, tiny_rows("llama", 6), **OPTIONS)) as trainer:
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


def test_tokens_of_a_tied_embedding_are_trained_in_the_head_as_well(tmp_path: Path) -> None:
    model = adapted(tiny_model("llama-tied"), "lora and tokens")
    with closing(sft_trainer(tmp_path / "run", model, **OPTIONS)) as trainer:
        before = weights_of(trainer.model)
        trainer.train()
        assert sorted(differing(weights_of(trainer.model), before)) == trainable_names(trainer.model)
        trainer.save_model(str(tmp_path / "adapter"))
        expected = logits_of(trainer.model)
    assert torch.equal(
        logits_of(PeftModel.from_pretrained(tiny_model("llama-tied"), str(tmp_path / "adapter"))), expected
    )


def test_only_the_active_adapter_is_trained(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "lora")
    model = adapted(AutoModelForCausalLM.from_pretrained(base), "lora")
    model.add_adapter("other", ADAPTERS["dora"]())
    model.set_adapter("other")
    with closing(zo_trainer(tmp_path / "run", model, tiny_rows("llama", 6), **OPTIONS)) as trainer:
        before = weights_of(trainer.model)
        trainer.train()
        changed = differing(weights_of(trainer.model), before)
        assert sorted(changed) == trainable_names(trainer.model)
        assert changed and all(".other." in name for name in changed)
        assert all(log["zo/bytes_disk_written"] == 0 for log in step_logs(trainer))


def test_merging_an_adapter_changes_the_model_and_not_the_files_of_its_base(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "lora")
    before = hashes(base)
    with closing(zo_ready(tmp_path / "run", base, "lora")) as trainer:
        trainer.train()
        expected = logits_of(trainer.model)
        trainer.model.merge_adapter()
        merged = logits_of(trainer.model)
        assert torch.allclose(merged, expected, atol=1e-5) and not torch.equal(merged, expected)
        trainer.model.unmerge_adapter()
        assert torch.allclose(logits_of(trainer.model), expected, atol=1e-5)
    assert hashes(base) == before
