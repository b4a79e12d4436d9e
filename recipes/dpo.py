# /// script
# requires-python = ">=3.11"
# dependencies = ["zo2trl"]
# ///
"""Train by direct preference optimisation with forward passes only; takes the arguments of TRL's `dpo` script as well.

# Adapters: the reference is the base model without them. It is evaluated once for every row, and not in a step.
python recipes/dpo.py \
    --model_name_or_path Qwen/Qwen3-14B \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --use_peft --lora_r 16 --lora_alpha 32 \
    --precompute_ref_log_probs \
    --device_memory 8GB --cpu_memory 32GB \
    --learning_rate 1e-4 --zo_eps 1e-2 \
    --per_device_train_batch_size 16 \
    --max_steps 2000 \
    --output_dir qwen3-14b-dpo

# Full weights: the reference is the model before training, evaluated once for every row. No second copy is held.
python recipes/dpo.py \
    --model_name_or_path Qwen/Qwen3-1.7B \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --learning_rate 1e-7 \
    --max_steps 2000 \
    --output_dir qwen3-1.7b-dpo

It does the same as `zo2trl dpo`, and is there to be copied and changed. It takes every argument of `ZODPOConfig`, and
needs zo2trl to be installed (`pip install -e .` in a clone).
"""

from zo2trl.trainers.scripts import main

if __name__ == "__main__":
    main("dpo")
