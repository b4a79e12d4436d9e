import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from zo2trl.checkpoints import convert
from zo2trl.checkpoints.convert import convert_checkpoint
from zo2trl.checkpoints.load import load_mapped
from zo2trl.errors import CheckpointError, StoreError

tqdm.monitor_interval = 0  # Its thread would outlive the test.

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}


def opt(**kwargs: Any) -> PreTrainedModel:
    sizes = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**sizes, **kwargs))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48))


def roberta() -> PreTrainedModel:
    return RobertaForMaskedLM(RobertaConfig(**SMALL, intermediate_size=48, max_position_embeddings=40))


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))


def pickled(folder: Path, model: PreTrainedModel, n_shards: int = 1, **kwargs: Any) -> Path:
    """A checkpoint folder as it was before safetensors: tied tensors share storage inside each pickle."""
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    state = model.state_dict()
    if n_shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **kwargs)
        return folder
    weight_map = {}
    for number in range(n_shards):
        name = f"pytorch_model-{number + 1:05d}-of-{n_shards:05d}.bin"
        part = {key: state[key] for key in list(state)[number::n_shards]}
        torch.save(part, folder / name, **kwargs)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def randomised(model: PreTrainedModel, dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(dtype)


def assert_same(ours: PreTrainedModel, plain: PreTrainedModel) -> None:
    got, want = dict(ours.named_parameters()), dict(plain.named_parameters())
    assert list(got) == list(want)  # Tied weights are listed once, so the ties are the same too.
    assert all(got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("maker", [opt, llama, roberta, t5])
@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_pretrained_gives_the_same_model_before_and_after(
    tmp_path: Path, maker: Callable[[], PreTrainedModel], n_shards: int, dtype: torch.dtype
) -> None:
    model = randomised(maker(), dtype)
    source = pickled(tmp_path / "source", model, n_shards)
    convert_checkpoint(source, tmp_path / "converted")
    plain = type(model).from_pretrained(source, use_safetensors=False)
    assert_same(type(model).from_pretrained(tmp_path / "converted", use_safetensors=True), plain)
    mapped = load_mapped(tmp_path / "converted")
    for name, wanted in mapped.casts().items():  # T5 keeps one matrix per block in float32.
        mapped.model.get_parameter(name).data = mapped.model.get_parameter(name).to(wanted)
    assert_same(mapped.model, plain)


def test_a_tied_head_is_written_once_under_the_name_of_the_embedding(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source", randomised(opt()))
    convert_checkpoint(source, tmp_path / "converted")
    names = set(load_file(tmp_path / "converted" / "model.safetensors"))
    assert "model.decoder.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model = OPTForCausalLM.from_pretrained(tmp_path / "converted")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_names_without_the_base_prefix_are_tied_all_the_same(tmp_path: Path) -> None:
    # The first OPT checkpoints were saved so: "decoder.embed_tokens.weight" beside "lm_head.weight".
    model = randomised(opt())
    source = pickled(tmp_path / "source", model)
    old = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    torch.save(old, source / "pytorch_model.bin")
    convert_checkpoint(source, tmp_path / "converted")
    assert "lm_head.weight" not in load_file(tmp_path / "converted" / "model.safetensors")
    assert_same(OPTForCausalLM.from_pretrained(tmp_path / "converted"), model)


def test_shared_storage_that_the_model_does_not_tie_is_written_under_every_name(tmp_path: Path) -> None:
    model = randomised(opt(tie_word_embeddings=False))
    model.lm_head.weight = model.model.decoder.embed_tokens.weight
    source = pickled(tmp_path / "source", model)
    convert_checkpoint(source, tmp_path / "converted")
    state = OPTForCausalLM.from_pretrained(tmp_path / "converted").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_an_unknown_architecture_is_converted_with_every_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "nobody-knows", "architectures": ["Unknown"]}')
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "c": shared.view(2, 3).T}, source / "pytorch_model.bin")
    convert_checkpoint(source, tmp_path / "converted")
    written = load_file(tmp_path / "converted" / "model.safetensors")
    assert sorted(written) == ["a", "b", "c"]
    assert torch.equal(written["c"], shared.view(2, 3).T)


DTYPES = sorted(convert._SAFETENSORS_DTYPES, key=str)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6))
def test_the_file_is_what_safetensors_reads_and_every_tensor_is_aligned(
    tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    torch.manual_seed(0)
    tensors = {}
    for number, (dtype, shape) in enumerate(specs):
        raw = torch.randint(0, 2, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
        tensors[f"t{number}"] = raw.view(dtype).reshape(shape)
    assert sum(convert._write(tensors, path)) == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert sorted(opened.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            got = opened.get_tensor(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert got.contiguous().flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())


def test_tensors_larger_than_a_piece_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "COPY_PIECE_BYTES", 1000)
    model = randomised(llama())
    convert_checkpoint(pickled(tmp_path / "source", model), tmp_path / "converted")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "converted"), model)


def test_a_pickle_from_before_zip_archives_is_converted(tmp_path: Path) -> None:
    model = randomised(opt())
    source = pickled(tmp_path / "source", model, _use_new_zipfile_serialization=False)
    convert_checkpoint(source, tmp_path / "converted")
    assert_same(OPTForCausalLM.from_pretrained(tmp_path / "converted"), model)


def test_tokenizer_templates_and_generation_files_come_along_and_pickles_do_not(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source", randomised(opt()), 2)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (source / "merges.txt").write_text("")
    for name in ("training_args.bin", "optimizer.pt", "tf_model.h5"):
        (source / name).write_bytes(b"x")
    (source / "runs").mkdir()
    convert_checkpoint(source, tmp_path / "converted")
    assert sorted(
        file.relative_to(tmp_path / "converted").as_posix() for file in (tmp_path / "converted").rglob("*")
    ) == [
        "additional_chat_templates",
        "additional_chat_templates/tools.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert AutoTokenizer.from_pretrained(tmp_path / "converted")("a")["input_ids"] == [0]
    assert AutoModel.from_pretrained(tmp_path / "converted") is not None


class Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source", opt())
    torch.save({"a": torch.ones(2), "b": Hostile(tmp_path / "witness")}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"nothing but tensors.*Nothing in it was run"):
        convert_checkpoint(source, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.ones(2)], "holds a list, not tensors by name"),
        ({"model": {"a": torch.ones(2)}}, "holds a dict named 'model'"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "torch.complex64 named 'a'"),
        ({"a": torch.eye(3).to_sparse()}, "sparse_coo tensor"),
    ],
)
def test_what_safetensors_cannot_hold_is_named(tmp_path: Path, content: Any, complaint: str) -> None:
    source = pickled(tmp_path / "source", opt())
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=complaint):
        convert_checkpoint(source, tmp_path / "converted")


def test_a_cut_pickle_is_named(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source", opt())
    whole = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin could not be read"):
        convert_checkpoint(source, tmp_path / "converted")


def test_a_conversion_that_fails_midway_leaves_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pickled(tmp_path / "source", opt(), 2)
    original = convert.LOCAL.sync_data

    def fail_on_the_last(fd: int) -> None:
        if "00002" in Path(f"/proc/self/fd/{fd}").readlink().name:
            raise StoreError("the drive failed")
        original(fd)

    monkeypatch.setattr(convert.LOCAL, "sync_data", fail_on_the_last)
    with pytest.raises(StoreError, match="the drive failed"):
        convert_checkpoint(source, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_killed_conversion_never_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pickled(tmp_path / "source", opt(), 2)
    seen: list[bool] = []
    original = convert.LOCAL.rename

    def look_before(old: Path, new: Path) -> None:
        seen.append((tmp_path / "converted").exists())
        original(old, new)

    monkeypatch.setattr(convert.LOCAL, "rename", look_before)
    convert_checkpoint(source, tmp_path / "converted")
    assert seen and not any(seen)


def test_what_an_earlier_cut_off_left_is_not_overwritten(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source", opt())
    (tmp_path / "converted.tmp").mkdir()
    with pytest.raises(CheckpointError, match=r"converted\.tmp exists.*delete the folder"):
        convert_checkpoint(source, tmp_path / "converted")


def test_a_destination_in_use_is_left_alone_and_an_empty_one_is_filled(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source", opt())
    taken = tmp_path / "taken"
    taken.mkdir()
    convert_checkpoint(source, taken)
    before = sorted(taken.iterdir())
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert_checkpoint(source, taken)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert_checkpoint(source, source)
    assert sorted(taken.iterdir()) == before


def test_a_source_with_nothing_to_convert_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "converted")
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert_checkpoint(tmp_path, tmp_path / "converted")
    opt().save_pretrained(tmp_path / "modern")
    with pytest.raises(CheckpointError, match="has safetensors weights already"):
        convert_checkpoint(tmp_path / "modern", tmp_path / "converted")


@pytest.mark.parametrize("shard", ["/etc/passwd", "../source.bin"])
def test_an_index_that_leads_out_of_the_source_is_refused(tmp_path: Path, shard: str) -> None:
    source = pickled(tmp_path / "source", opt(), 2)
    index = {"metadata": {}, "weight_map": {"a": shard}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a safe file name"):
        convert_checkpoint(source, tmp_path / "converted")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source", opt(), 3)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"1 of the 3 weight files .* the first is pytorch_model-00002"):
        convert_checkpoint(source, tmp_path / "converted")


def test_a_companion_that_links_out_of_the_source_is_refused(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source", opt())
    (tmp_path / "secret.txt").write_text("secret")
    (source / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match="it leads to"):
        convert_checkpoint(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
