"""ZOSFTTrainer handles data sets, packing, completion-only loss, adapters and string models as TRL's does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model, tiny_rows
from tests.support.plain import PlainZO
from tests.support.runs import (
    EVERYTHING_ON_DEVICE,
    STREAMED_FROM_CPU,
    STREAMED_FROM_DISK,
    closing,
    differing,
    prompts,
    sft_trainer,
    step_logs,
    tiers_of,
    weights_of,
    zo_trainer,
)
from tests.support.tokenizer import tiny_tokenizer
from zo2trl import ZOSFTConfig, ZOSFTTrainer
from zo2trl.errors import CheckpointError

PLACES = pytest.mark.parametrize(
    "place",
    [EVERYTHING_ON_DEVICE, STREAMED_FROM_CPU, STREAMED_FROM_DISK],
    ids=["device", "cpu", "disk"],
)
TEXTS = Dataset.from_list([{"text": f"the film was w{i} w{i + 1} verdict : good"} for i in range(16)])


def saved_model(folder: Path, name: str = "opt", *, dtype: torch.dtype = torch.float32) -> str:
    """Make a checkpoint folder with its tokenizer, as on the Hub."""
    tiny_model(name, dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# -- data


@PLACES
@pytest.mark.parametrize("name", ["opt", "qwen3", "mixtral"])
def test_every_place_trains_to_the_same_weights(name: str, place: dict, tmp_path: Path) -> None:
    runs = []
    for folder, options in (("here", place), ("reference", EVERYTHING_ON_DEVICE)):
        with closing(sft_trainer(tmp_path / folder, tiny_model(name), **options)) as trainer:
            trainer.train()
            runs.append((weights_of(trainer.model), [log["zo/loss_plus"] for log in step_logs(trainer)]))
    assert runs[0][1] == runs[1][1]
    assert differing(runs[0][0], runs[1][0]) == []


def test_only_completions_are_learned_from_unless_told_otherwise(tmp_path: Path) -> None:
    losses = {}
    for only in (True, False):
        with closing(
            sft_trainer(tmp_path / str(only), tiny_model("opt"), completion_only_loss=only, max_steps=1)
        ) as trainer:
            row = trainer.train_dataset[0]
            n_labels = sum(label != -100 for label in row["labels"])
            assert n_labels == (2 if only else len(row["input_ids"]))  # the verdict and the end of text
            trainer.train()
            losses[only] = step_logs(trainer)[0]["loss"]
    assert losses[True] != losses[False]


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_examples_train_from_disk_as_in_memory(strategy: str, tmp_path: Path) -> None:
    runs = []
    for folder, place in (("device", EVERYTHING_ON_DEVICE), ("disk", STREAMED_FROM_DISK)):
        options = {"packing": True, "packing_strategy": strategy, "max_length": 24, **place}
        with closing(sft_trainer(tmp_path / folder, tiny_model("llama"), TEXTS, **options)) as trainer:
            assert len(trainer.train_dataset) < len(TEXTS)
            trainer.train()
            runs.append([log["zo/projected_grad"] for log in step_logs(trainer)])
    assert runs[0] == runs[1]


def test_a_formatting_function_is_used(tmp_path: Path) -> None:
    extra = {"formatting_func": lambda row: f"{row['said']} bad"}
    rows = prompts().remove_columns("completion").rename_column("prompt", "said")
    with closing(sft_trainer(tmp_path, tiny_model("opt"), rows, extra=extra, max_steps=1)) as trainer:
        assert "bad" in tiny_tokenizer().decode(trainer.train_dataset[0]["input_ids"])
        trainer.train()


def test_a_streamed_dataset_trains(tmp_path: Path) -> None:
    rows = prompts(12).to_iterable_dataset()
    with closing(sft_trainer(tmp_path, tiny_model("opt"), rows, max_steps=3)) as trainer:
        assert trainer.train().global_step == 3


def test_the_loss_is_the_plain_trainers_loss(tmp_path: Path) -> None:
    with closing(sft_trainer(tmp_path / "zo", tiny_model("llama"), learning_rate=0.0, max_steps=4)) as trainer:
        ours = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    config = SFTConfig(output_dir=str(tmp_path / "plain"), max_length=32, report_to="none", bf16=False, use_cpu=True)
    config.per_device_eval_batch_size = 2
    plain = SFTTrainer(tiny_model("llama"), config, train_dataset=prompts(), processing_class=tiny_tokenizer())
    assert ours == pytest.approx(plain.evaluate(plain.train_dataset)["eval_loss"], abs=1e-6)


# -- models given as a path


@PLACES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_given_by_path_keeps_the_dtype_of_its_checkpoint(
    dtype: torch.dtype, place: dict, tmp_path: Path
) -> None:
    path = saved_model(tmp_path / "start", dtype=dtype)
    with closing(sft_trainer(tmp_path / "run", path, **place)) as trainer:
        assert {p.dtype for p in trainer.model.parameters()} == {dtype}
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        found, logs = weights_of(trainer.model), step_logs(trainer)
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in logs)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert {p.dtype for p in reloaded.parameters()} == {dtype}
    assert differing(weights_of(reloaded), found) == []
    assert differing(found, weights_of(tiny_model("opt", dtype=dtype))) != []


@PLACES
@pytest.mark.parametrize("wanted", ["bfloat16", torch.bfloat16, "float32"], ids=["name", "dtype", "same"])
def test_model_init_kwargs_choose_another_dtype(wanted: Any, place: dict, tmp_path: Path) -> None:
    path = saved_model(tmp_path / "start")
    dtype = torch.float32 if wanted == "float32" else torch.bfloat16
    options = {"model_init_kwargs": {"dtype": wanted}, "learning_rate": 0.0, **place}
    with closing(sft_trainer(tmp_path / "run", path, **options)) as trainer:
        trainer.train()
        assert differing(weights_of(trainer.model), weights_of(tiny_model("opt").to(dtype))) == []
        sizes = sum(size for _, _, size in trainer.engine.store.describe())
        assert sizes < 1.1 * sum(-(-p.numel() // 4096) * 4096 * dtype.itemsize for p in trainer.model.parameters())
        assert trainer.args.model_init_kwargs == {"dtype": wanted}


def test_a_model_given_by_path_is_the_one_given_loaded(tmp_path: Path) -> None:
    path, runs = saved_model(tmp_path / "start", "mixtral"), []
    for folder, model in (("path", path), ("loaded", tiny_model("mixtral"))):
        with closing(sft_trainer(tmp_path / folder, model, **STREAMED_FROM_DISK)) as trainer:
            trainer.train()
            runs.append(weights_of(trainer.model))
    assert differing(*runs) == []


def test_the_tokenizer_comes_from_the_model_folder(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "start")
    config = ZOSFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True)
    with closing(ZOSFTTrainer(model=path, args=config, train_dataset=prompts())) as trainer:
        assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
        trainer.train()


@pytest.mark.parametrize("make", [sft_trainer, zo_trainer], ids=["sft", "trainer"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(make: Any, tmp_path: Path) -> None:
    path = Path(saved_model(tmp_path / "start"))
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    rows = tiny_rows("opt", 4) if make is zo_trainer else prompts()
    with pytest.raises(CheckpointError, match=f"zo2trl convert {path}"):
        make(tmp_path / "run", str(path), rows)


# -- adapters


def lora(**options: Any) -> LoraConfig:
    targets = options.pop("target_modules", ["q_proj", "v_proj", "fc1"])
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)


def file_stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*@*")}


@PLACES
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_with_an_adapter_only_the_adapter_moves(variant: str, place: dict, tmp_path: Path) -> None:
    extra = {"peft_config": lora(use_dora=variant == "dora")}
    stamps: list[dict] = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(file_stamps(tmp_path / "run" / "store"))

    extra["callbacks"] = [Look()]
    options = {"learning_rate": 1e-2, **place}
    with closing(sft_trainer(tmp_path / "run", tiny_model("opt"), extra=extra, **options)) as trainer:
        before = weights_of(trainer.model)
        trainer.train()
        stamps.append(file_stamps(tmp_path / "run" / "store"))
        changed = differing(weights_of(trainer.model), before)
        trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert sorted(changed) == sorted(trainable)
        assert all("lora_" in name for name in changed)
        assert all(log["zo/bytes_disk_written"] == 0 for log in step_logs(trainer))
        assert stamps[0] == stamps[-1]  # not even the same bytes again
        trainer.save_model(str(tmp_path / "adapter"))
        found = {name: before[name] for name in before} | weights_of(trainer.model)
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    reloaded = PeftModel.from_pretrained(tiny_model("opt"), str(tmp_path / "adapter"))
    assert differing(weights_of(reloaded), found) == []


def test_streamed_adapters_train_to_the_bits_of_the_plain_algorithm(tmp_path: Path) -> None:
    def adapted() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return get_peft_model(tiny_model("opt"), lora())

    batches: list[dict] = []
    with closing(sft_trainer(tmp_path, adapted(), **STREAMED_FROM_DISK, learning_rate=1e-2)) as trainer:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: batches.append(collate(rows)) or dict(batches[-1])
        trainer.train()
        found, logs = weights_of(trainer.model), step_logs(trainer)
    model = adapted().eval()
    algorithm = PlainZO(model)
    steps = [
        algorithm.step([lambda b=batch: model(**b).loss], step=i, learning_rate=1e-2)
        for i, batch in enumerate(batches[:3])  # the loader collates one ahead
    ]
    # TRL computes the loss in its fused head, so the last bits of a loss may differ from the model's own.
    assert [log["zo/loss_plus"] for log in logs] == pytest.approx([step.loss_plus for step in steps], abs=2e-6)
    assert all(torch.allclose(found[name], p, atol=1e-3) for name, p in weights_of(model).items())


def test_an_adapter_on_a_bf16_base_is_kept_in_fp32(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "start", dtype=torch.bfloat16)
    with closing(sft_trainer(tmp_path / "run", path, extra={"peft_config": lora()}, **STREAMED_FROM_DISK)) as trainer:
        trainer.train()
        dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_an_adapted_base_streams_read_only_with_its_adapters_resident(tmp_path: Path) -> None:
    with closing(
        sft_trainer(tmp_path, tiny_model("opt"), extra={"peft_config": lora()}, **STREAMED_FROM_DISK)
    ) as trainer:
        assert tiers_of(trainer) == {"gpu", "disk"}
        for unit in trainer.engine.store.layout.units:
            tier = trainer.engine.store.tier_of(unit)
            assert (tier == "disk") == (unit.kind == "block")
            assert unit.kind == "root" or any(t.trainable for t in unit.tensors) == (tier == "gpu")


# -- the rest of the trainer


def test_a_model_card_is_written(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "save_full_weights": True}
    with closing(sft_trainer(tmp_path, tiny_model("opt"), **options)) as trainer:
        trainer.train()
        trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "tiny" in card
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()


@pytest.mark.parametrize("bf16", [True, False])
def test_autocast_gives_both_probes_their_own_weights(bf16: bool, tmp_path: Path) -> None:
    # With autocast's weight cache the minus probe would silently see the plus probe's weights: gradient 0.
    grads = {}
    for folder, place in (("device", EVERYTHING_ON_DEVICE), ("disk", STREAMED_FROM_DISK)):
        options = {"bf16": bf16, "zo_eps": 1e-2, **place}
        with closing(sft_trainer(tmp_path / folder, tiny_model("llama"), **options)) as trainer:
            trainer.train()
            grads[folder] = [log["zo/projected_grad"] for log in step_logs(trainer)]
    assert grads["device"] == grads["disk"]
    assert all(abs(grad) > 1e-3 for grad in grads["disk"])


def test_the_trained_model_is_an_ordinary_model(tmp_path: Path) -> None:
    with closing(sft_trainer(tmp_path / "run", tiny_model("opt"), **STREAMED_FROM_DISK)) as trainer:
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        model = trainer.model
    assert isinstance(model, PreTrainedModel)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    ids = tiny_tokenizer()("the film was verdict :", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model.eval()(ids).logits)
