import ctypes
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from zo2trl.checkpoints.load import MappedModel, load_mapped
from zo2trl.errors import CheckpointError, ConfigError, UnsupportedError

# A progress bar of transformers would start a thread of tqdm's own that outlives the test.
tqdm.monitor_interval = 0

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}


def opt() -> PreTrainedModel:
    return hf.OPTForCausalLM(hf.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64))


def llama() -> PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GATED, tie_word_embeddings=False))


def gemma() -> PreTrainedModel:
    # Its embedding scale is a buffer made in the model's dtype, and 45.25 in bfloat16 is not sqrt(2048).
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**{**GATED, "hidden_size": 72, "head_dim": 16}))


def mixtral() -> PreTrainedModel:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**GATED, num_local_experts=4))


def qwen3_moe() -> PreTrainedModel:
    sizes = {**GATED, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    layers = {"head_dim": 8, "tie_word_embeddings": True, "mlp_only_layers": [1]}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes, **layers))


def roberta() -> PreTrainedModel:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL, intermediate_size=48, max_position_embeddings=40))


def t5() -> PreTrainedModel:
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, num_heads=4, decoder_start_token_id=0))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    maker.__name__: maker for maker in (opt, llama, gemma, mixtral, qwen3_moe, roberta, t5)
}


def saved(
    folder: Path, maker: Callable[[], PreTrainedModel], dtype: torch.dtype = torch.bfloat16, **kwargs: Any
) -> Path:
    torch.manual_seed(7)
    model = maker()
    with torch.no_grad():
        for parameter in model.parameters():  # Norms of ones and biases of zeros would hide swapped tensors.
            parameter.normal_()
    model.to(dtype).save_pretrained(folder, **kwargs)
    return folder


def loaded(folder: Path, **kwargs: Any) -> MappedModel:
    return load_mapped(folder, offload_folder=folder.parent / "offload", **kwargs)


def settle(mapped: MappedModel) -> PreTrainedModel:
    """Do what the store does while it adopts."""
    for name, dtype in mapped.casts().items():
        parameter = mapped.model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
    return mapped.model


def ties(model: PreTrainedModel) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def assert_same(ours: PreTrainedModel, plain: PreTrainedModel) -> None:
    assert type(ours) is type(plain)
    for mine, theirs in ((ours.named_parameters, plain.named_parameters), (ours.named_buffers, plain.named_buffers)):
        got, want = dict(mine()), dict(theirs())
        assert list(got) == list(want)
        for name in want:
            assert got[name].device == want[name].device == torch.device("cpu")
            assert got[name].dtype == want[name].dtype, name
            assert torch.equal(got[name], want[name]), name
            assert got[name].requires_grad == want[name].requires_grad
    assert ties(ours) == ties(plain)
    assert ours.config.to_dict() | {"_name_or_path": None} == plain.config.to_dict() | {"_name_or_path": None}
    assert ours.training == plain.training
    ids = torch.arange(2, 18).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss)


def own_bytes() -> int:
    """Anonymous memory of this process, without what the allocator keeps of freed tensors."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:")) * 1024


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["50GB", "20kB"])
def test_a_mapped_model_equals_from_pretrained_bit_for_bit(tmp_path: Path, name: str, shard: str) -> None:
    folder = saved(tmp_path / "model", MODELS[name], max_shard_size=shard)
    mapped = loaded(folder)
    assert mapped.dtype is None and mapped.casts() == {}
    assert_same(mapped.model, type(mapped.model).from_pretrained(folder))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "float32"),
        (torch.float16, "bfloat16"),
        (torch.float32, "float16"),
    ],
)
def test_a_different_dtype_is_left_to_the_store_and_ends_as_from_pretrained(
    tmp_path: Path, name: str, stored: torch.dtype, wanted: str
) -> None:
    folder = saved(tmp_path / "model", MODELS[name], stored)
    mapped = loaded(folder, dtype=wanted)
    assert mapped.dtype == getattr(torch, wanted)
    blocks_as_stored = {p.dtype for n, p in mapped.model.named_parameters() if "q_proj" in n or "SelfAttention" in n}
    assert blocks_as_stored <= {stored}
    assert_same(settle(mapped), type(mapped.model).from_pretrained(folder, dtype=wanted))


def test_a_checkpoint_of_mixed_dtypes_is_rounded_once(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        tensors[name] = torch.randn(tensors[name].shape)  # float32 among bfloat16
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype in (None, "float16", "float32"):
        kwargs = {"dtype": dtype} if dtype else {}
        assert_same(settle(loaded(folder, **kwargs)), hf.LlamaForCausalLM.from_pretrained(folder, **kwargs))


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["auto", None, "float32", torch.float32])
def test_dtype_is_spelled_as_for_from_pretrained(tmp_path: Path, spelling: str, value: Any) -> None:
    folder = saved(tmp_path / "model", opt)
    expected = torch.float32 if value in ("float32", torch.float32) else torch.bfloat16
    assert settle(loaded(folder, **{spelling: value})).dtype == expected


@pytest.mark.parametrize("value", ["bfloat", "int8", 16])
def test_a_dtype_that_is_none_is_refused_with_the_nearest_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"`dtype` must be .*Did you mean '\w+float\d+|float\d+'"):
        loaded(tmp_path, dtype=value)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_nothing_of_the_fused_route_stays_on_the_model_or_on_disk(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model", MODELS[name])
    mapped = loaded(folder)
    assert list((tmp_path / "offload").iterdir()) == []
    for module in mapped.model.modules():
        assert not {"_hf_hook", "_old_forward", "hf_device_map", "to", "cuda", "forward"} & set(vars(module))
    assert mapped.model.to("cpu") is mapped.model
    mapped.model.save_pretrained(tmp_path / "again")
    assert_same(loaded(tmp_path / "again").model, type(mapped.model).from_pretrained(folder))


def test_fused_experts_need_a_folder_and_the_message_says_how_large(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", mixtral)
    with pytest.raises(ConfigError, match=r"111 kB have to be written once.*`offload_folder=`"):
        load_mapped(folder)


def test_a_full_offload_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", mixtral)
    monkeypatch.setattr("zo2trl.files.fs.FS.free_bytes", lambda self, path: 1000)
    with pytest.raises(ConfigError, match=r"has 1 kB free; .* takes 111 kB"):
        loaded(folder)
    assert list((tmp_path / "offload").iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_loading_takes_no_memory_for_the_blocks(tmp_path: Path, name: str, dtype: str) -> None:
    sizes = {**GATED, "hidden_size": 512, "intermediate_size": 2048 if name == "llama" else 512}
    maker = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)),
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**sizes)),
    }[name]
    folder = saved(tmp_path / "model", maker)
    loaded(saved(tmp_path / "warm-up", MODELS[name]))
    before = own_bytes()
    mapped = loaded(folder, dtype=dtype)
    assert sum(parameter.nbytes for parameter in mapped.model.parameters()) > 20e6
    assert own_bytes() - before < 2e6


def test_writing_into_a_mapped_parameter_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", opt)
    before = (folder / "model.safetensors").read_bytes()
    mapped = loaded(folder)
    with torch.no_grad():
        for parameter in mapped.model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_class_is_the_one_the_configuration_names_unless_given(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", t5)
    assert type(loaded(folder).model) is hf.T5ForConditionalGeneration
    llama_folder = saved(tmp_path / "llama", llama)
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert type(loaded(llama_folder).model) is hf.LlamaForCausalLM
    assert type(loaded(llama_folder, model_class=hf.AutoModelForCausalLM).model) is hf.LlamaForCausalLM


def test_a_new_head_is_made_as_from_pretrained_makes_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama)
    torch.manual_seed(3)
    ours = loaded(folder, model_class=hf.AutoModelForSequenceClassification, num_labels=5).model
    torch.manual_seed(3)
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert ours.score.weight.shape == (5, 32)
    assert torch.equal(ours.score.weight, theirs.score.weight)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_from_pretrained_arguments_reach_the_model(tmp_path: Path, device_map: str | None) -> None:
    folder = saved(tmp_path / "model", llama)
    arguments = {"attn_implementation": "eager", "revision": "main", "trust_remote_code": False, "use_cache": False}
    model = loaded(folder, **arguments, num_hidden_layers=2, device_map=device_map).model
    assert not hasattr(model, "hf_device_map")
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False
    assert len(model.model.layers) == 2


def test_a_subfolder_and_a_variant_are_found(tmp_path: Path) -> None:
    saved(tmp_path / "model" / "inner", llama, variant="fp16")
    mapped = loaded(tmp_path / "model", subfolder="inner", variant="fp16")
    assert_same(mapped.model, hf.LlamaForCausalLM.from_pretrained(tmp_path / "model" / "inner", variant="fp16"))


def test_a_hub_cache_is_read_by_id_and_by_snapshot_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama, max_shard_size="20kB")
    repo, commit = tmp_path / "hub" / "models--someone--llama", "a" * 40
    snapshot = repo / "snapshots" / commit
    for made in (snapshot, repo / "blobs", repo / "refs"):
        made.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repo / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    plain = hf.LlamaForCausalLM.from_pretrained(folder)
    assert_same(load_mapped(snapshot).model, hf.LlamaForCausalLM.from_pretrained(snapshot))
    by_id = load_mapped("someone/llama", cache_dir=tmp_path / "hub").model
    assert all(torch.equal(a, b) for a, b in zip(by_id.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("device_map", ["cuda", "balanced", {"": 0}, {"": "cpu"}, 0, torch.device("cuda")])
def test_a_device_map_is_refused_because_the_store_places_parameters(tmp_path: Path, device_map: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"`device_map=.*store decides where parameters live"):
        loaded(tmp_path, device_map=device_map)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_memory", {0: "1GB"}),
        ("tp_plan", "auto"),
        ("gguf_file", "x.gguf"),
        ("disable_mmap", True),
        ("output_loading_info", True),
        ("load_in_4bit", True),
        ("use_safetensors", False),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"`{name}"):
        loaded(tmp_path, **{name: value})


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"is quantised .* Train an adapter on it"):
        loaded(folder)
    with pytest.raises(UnsupportedError, match=r"is quantised .* Train an adapter on it"):
        loaded(saved(tmp_path / "other", llama), quantization_config=hf.BitsAndBytesConfig(load_in_8bit=True))


def test_an_adapter_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(UnsupportedError, match="is an adapter"):
        loaded(tmp_path)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", opt)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"`zo2trl convert {folder} {folder}-safetensors`"):
        loaded(folder)


def test_a_folder_without_weights_or_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        loaded(tmp_path)
    folder = saved(tmp_path / "model", opt)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights to load"):
        loaded(folder)


def with_index(tmp_path: Path, shard: str) -> Path:
    folder = saved(tmp_path / "model", llama, max_shard_size="20kB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = shard
    path.write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shard", ["/etc/passwd", "../other.safetensors", "a/../../b.safetensors", "a\0b"])
def test_an_index_that_names_files_outside_the_folder_is_refused_before_any_is_opened(
    tmp_path: Path, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_index(tmp_path, shard)
    monkeypatch.setattr("zo2trl.checkpoints.load.safe_open", lambda *args, **kwargs: pytest.fail("opened a file"))
    with pytest.raises(CheckpointError, match="not a safe file name"):
        loaded(folder)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = with_index(tmp_path, "linked.safetensors")
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "secret.safetensors")
    (folder / "linked.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="it leads to"):
        loaded(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metadata": {}, "weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    folder = with_index(tmp_path, "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not an index of weights"):
        loaded(folder)


def test_a_missing_and_a_cut_shard_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama, max_shard_size="20kB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a whole safetensors file"):
        loaded(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing, the first is {shard.name}"):
        loaded(folder)


def test_a_block_with_a_missing_tensor_is_refused_on_the_offloaded_route(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        loaded(folder, dtype="float32")


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    folders = [saved(tmp_path / maker.__name__, maker) for maker in (llama, mixtral)]
    state = torch.random.get_rng_state()
    for folder in folders:
        loaded(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
