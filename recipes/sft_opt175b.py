# /// script
# requires-python = ">=3.11"
# dependencies = ["zo2trl"]
# ///
"""Fine-tune OPT of any size, up to 175 B parameters, on one device, out of three tiers.

# Try the whole path here and now: random weights, random tokens, the least memory that works
python recipes/sft_opt175b.py --size 125m --random_init --device_memory min --cpu_memory 0 --max_steps 5

# Measure a step at full size without the weights: this writes a random checkpoint first, one block at a time
python recipes/sft_opt175b.py --size 175b --random_init --model_dir /nvme/opt-175b-random \
    --device_memory 40GB --cpu_memory 200GB --output_dir /nvme/run --batch_size 64 --max_steps 10

# Train real weights: a folder with safetensors weights and a tokenizer, and your own prompts and completions
python recipes/sft_opt175b.py --size 13b --model_dir /nvme/opt-13b --dataset_file train.jsonl \
    --device_memory 8GB --output_dir /nvme/run --learning_rate 1e-6 --max_steps 2000

The published OPT checkpoints hold pickled weights; convert such a folder once: zo2trl convert SRC DST

It takes 2 bytes of disk per parameter for the checkpoint in bfloat16, as much again for blocks that live on disk,
and two blocks (three if there is room) plus a perturbed copy of one on the device. The script prints where the
blocks live before it starts, and the measured time, tokens per second and bytes per step when it is done.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from zo2trl import ZOSFTConfig, ZOSFTTrainer
from zo2trl.errors import CheckpointError, ConfigError, ZO2TRLError

# Blocks, width and heads are those of the OPT paper, table 1.
SIZES = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "1.3b": (24, 2048, 32),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "66b": (64, 9216, 72),
    "175b": (96, 12288, 96),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BLOCKS = "model.decoder.layers."
INDEX = "model.safetensors.index.json"
INIT_STD = 0.006  # from the paper (section 2.2), without its smaller output layers

console = Console()


def main() -> None:
    """Find or write the checkpoint, train, and print the measurements."""
    args = parse_arguments()
    folder = args.model_dir or args.output_dir / f"opt-{args.size}-random"
    if args.random_init:
        write_random_checkpoint(folder, args.size, dtype=DTYPES[args.dtype], seed=args.seed)
    elif not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json, so there is no checkpoint to train. Name a folder with safetensors "
            "weights and a tokenizer with `--model_dir`, or add `--random_init` for a run on random weights."
        )
    trainer = ZOSFTTrainer(
        model=str(folder),
        args=training_arguments(args),
        train_dataset=training_data(args),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    console.print(where_blocks_live(trainer))
    result = trainer.train()
    console.print(what_was_measured(trainer, seconds=result.metrics["train_runtime"]))
    if args.save:
        trainer.save_model(str(args.output_dir / "tuned"))
    trainer.close()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--model_dir", type=Path, help="checkpoint folder; with --random_init, where to write it")
    parser.add_argument("--random_init", action="store_true", help="write and train random weights")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the random weights")
    parser.add_argument("--dataset_file", help="JSON lines with prompt and completion; without it, random tokens")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/opt"))
    parser.add_argument("--store_dir", help="folder of the store, on a fast local drive; default <output_dir>/store")
    parser.add_argument("--device_memory", default="auto")
    parser.add_argument("--cpu_memory", default="auto")
    parser.add_argument("--direction", default="rademacher")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--zo_eps", type=float, default=1e-3)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--sequence_length", type=int, default=128, help="tokens per row at most")
    parser.add_argument("--max_steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write the tuned model to <output_dir>/tuned")
    return parser.parse_args()


def training_arguments(args: argparse.Namespace) -> ZOSFTConfig:
    """Turn the command line into an SFT configuration."""
    return ZOSFTConfig(
        output_dir=str(args.output_dir),
        store_dir=args.store_dir,
        device_memory=args.device_memory,
        cpu_memory=args.cpu_memory,
        direction=args.direction,
        learning_rate=args.learning_rate,
        zo_eps=args.zo_eps,
        per_device_train_batch_size=args.batch_size,
        max_length=args.sequence_length,
        max_steps=args.max_steps,
        seed=args.seed,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )


def training_data(args: argparse.Namespace) -> Dataset:
    """Load the user's file, or draw rows of random byte tokens, which suffice for measuring."""
    if args.dataset_file:
        return load_dataset("json", data_files=args.dataset_file, split="train")
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size * args.max_steps, args.sequence_length)
    rows = torch.randint(4, 260, shape, generator=generator).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


# -- a random checkpoint, never in memory as a whole


def config_of(size: str, dtype: torch.dtype) -> OPTConfig:
    """Make OPT's configuration of one size; 350m alone has narrow embeddings and norms after the sublayers."""
    num_blocks, width, num_heads = SIZES[size]
    odd = size == "350m"
    return OPTConfig(
        num_hidden_layers=num_blocks,
        hidden_size=width,
        ffn_dim=4 * width,
        num_attention_heads=num_heads,
        word_embed_proj_dim=512 if odd else width,
        do_layer_norm_before=not odd,
        architectures=["OPTForCausalLM"],
        dtype=dtype,
    )


def write_random_checkpoint(folder: Path, size: str, *, dtype: torch.dtype, seed: int) -> None:
    """Write config, tokenizer and one safetensors file per block; a folder that is complete already is kept.

    Raises:
        ConfigError: the drive has no room for it.
    """
    if (folder / INDEX).is_file():
        console.print(f"{folder} holds a checkpoint already and is used as it is.")
        return
    config = config_of(size, dtype)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in OPTForCausalLM(config).named_parameters()}  # without the tied head
    n_bytes = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < n_bytes:
        raise ConfigError(
            f"OPT-{size} in {dtype} is {n_bytes:,} bytes, and {folder} has room for {free:,}. Choose another drive "
            "with `--model_dir`, or a smaller `--size`."
        )
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    files = list(files_of(shapes))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(track(files, f"Writing OPT-{size}, {n_bytes / 1e9:.3g} GB", console=console), 1):
        file_name = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {name: random_weight(name, shapes[name], dtype, generator=generator) for name in names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    # The index comes last: a folder without it was cut off and is written again.
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def files_of(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Yield tensor names by file: everything outside the blocks, then each block."""
    groups: dict[str, list[str]] = {"": []}
    for name in shapes:
        block = name.removeprefix(BLOCKS).split(".")[0] if name.startswith(BLOCKS) else ""
        groups.setdefault(block, []).append(name)
    yield from groups.values()


def random_weight(name: str, shape: torch.Size, dtype: torch.dtype, *, generator: torch.Generator) -> torch.Tensor:
    """Draw a tensor as OPT initialises it: norms 1, biases 0, everything else normal."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if "layer_norm" in name:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(std=INIT_STD, generator=generator)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte after OPT's four special tokens, which suffices for random weights."""
    special = {"bos_token": "</s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **special)


# -- what to print


def where_blocks_live(trainer: ZOSFTTrainer) -> Table:
    """List units and bytes per tier."""
    table = Table("tier", "units", "bytes", title="Where the weights live")
    rows = trainer.engine.store.describe()
    for tier in ("gpu", "cpu", "disk"):
        sizes = [n_bytes for _, name, n_bytes in rows if name == tier]
        table.add_row({"gpu": "device", "cpu": "host memory"}.get(tier, tier), str(len(sizes)), f"{sum(sizes):,}")
    return table


def what_was_measured(trainer: ZOSFTTrainer, *, seconds: float) -> Table:
    """List time and traffic of this run on this machine."""
    table = Table("measured", "mean", title="This run")
    table.add_row("seconds per step, evaluation and saving included", f"{seconds / trainer.state.global_step:.3g}")
    logs = [log for log in trainer.state.log_history if "zo/tokens_per_second" in log]
    for key in ("zo/tokens_per_second", "zo/bytes_h2d", "zo/bytes_d2h", "zo/bytes_disk_read", "zo/bytes_disk_written"):
        table.add_row(key, f"{sum(log[key] for log in logs) / len(logs):,.0f}")
    table.add_row("loss of the last step", f"{[log['loss'] for log in logs][-1]:.4f}")
    return table


if __name__ == "__main__":
    try:
        main()
    except ZO2TRLError as error:
        raise SystemExit(f"error: {error}") from None
