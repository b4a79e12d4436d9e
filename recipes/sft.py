# /// script
# requires-python = ">=3.11"
# dependencies = ["zo2trl"]
# ///
"""Fine-tune a model with forward passes only; takes the arguments of TRL's `sft` script and of `ZOSFTConfig`.

# Full fine-tuning with 8 GB of the GPU, the other weights in host memory and on disk
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

It does the same as `zo2trl sft`, and is there to be copied and changed. It needs zo2trl to be installed
(`pip install -e .` in a clone). Convert a checkpoint that has only pickled weights (`*.bin`) once:
zo2trl convert SRC DST
"""

from zo2trl.trainers.scripts import main

if __name__ == "__main__":
    main("sft")
