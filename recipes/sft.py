# /// script
# requires-python = ">=3.11"
# dependencies = ["zo2trl"]
# ///
"""Supervised fine-tuning with forward passes only: the arguments of TRL's `sft` script, plus those of `ZOSFTConfig`.

# Full fine-tuning, 8 GB of the GPU, the rest of the weights in host memory and on disk
python recipes/sft.py \
    --model_name_or_path Qwen/Qwen3-14B \
    --dataset_name trl-lib/Capybara \
    --device_memory 8GB \
    --cpu_memory 16GB \
    --learning_rate 1e-6 \
    --per_device_train_batch_size 16 \
    --max_steps 2000 \
    --output_dir qwen3-14b-sft

# LoRA
python recipes/sft.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/Capybara \
    --use_peft --lora_r 16 --lora_alpha 32 \
    --learning_rate 1e-4 \
    --zo_eps 1e-2 \
    --max_steps 2000 \
    --output_dir qwen3-0.6b-lora

# Everything from a file; arguments on the command line win
python recipes/sft.py --config recipes/sft.yaml --max_steps 100

Needs zo2trl to be installed (`pip install -e .` in a clone).
A checkpoint that has only pickled weights (`*.bin`) is converted once: zo2trl convert SRC DST
"""

from argparse import ArgumentParser
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset, get_peft_config

from zo2trl import ZOSFTConfig, ZOSFTTrainer
from zo2trl.errors import ConfigError, UnsupportedError


def main(
    script_args: ScriptArguments,
    training_args: ZOSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Train and save.

    Raises:
        ConfigError: no data set was named, or an argument cannot work.
    """
    if model_args.model_name_or_path is None:
        raise ConfigError("No model was named. Pass `--model_name_or_path` with a checkpoint's folder or hub id.")
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    dataset = load(script_args, dataset_args)
    wants_eval = training_args.eval_strategy != "no"
    trainer = ZOSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if wants_eval else None,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def model_init_kwargs(training_args: ZOSFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` is told. Without `--dtype` the checkpoint's own dtype is kept."""
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UnsupportedError("`--load_in_4bit` and `--load_in_8bit` do not work with weights in tiers. Remove them.")
    chosen = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": None if model_args.dtype in (None, "auto") else model_args.dtype,
    }
    given = training_args.model_init_kwargs or {}
    return {name: value for name, value in chosen.items() if value is not None} | dict(given)


def load(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> Any:
    """The data set that `--dataset_name` or the `datasets:` list of a config file names."""
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if script_args.dataset_name is None:
        raise ConfigError("No data set was named. Pass `--dataset_name`, or list `datasets:` in a `--config` file.")
    from datasets import load_dataset

    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )


def make_parser(subparsers: Any = None, prog: str | None = None) -> ArgumentParser:
    """A parser of its own, or one more command of `subparsers`, as TRL's command line does it."""
    dataclass_types = (ScriptArguments, ZOSFTConfig, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("sft", help="Fine-tune with forward passes only", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
