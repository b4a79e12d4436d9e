# /// script
# requires-python = ">=3.11"
# dependencies = ["zo2trl"]
# ///
"""Train a reward model with forward passes only; takes the arguments of TRL's `reward` script and `ZORewardConfig`.

# Full weights; the head starts random, and is trained like everything else
python recipes/reward.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --learning_rate 1e-6 \
    --per_device_train_batch_size 16 \
    --max_steps 2000 \
    --output_dir qwen3-0.6b-reward

# Adapters, and the head beside them, which PEFT saves with an adapter for sequence classification
python recipes/reward.py \
    --model_name_or_path Qwen/Qwen3-14B \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --use_peft --lora_r 16 --lora_alpha 32 \
    --learning_rate 1e-4 --zo_eps 1e-2 \
    --device_memory 8GB --cpu_memory 32GB \
    --max_steps 2000 \
    --output_dir qwen3-14b-reward

It does the same as `zo2trl reward`, and is there to be copied and changed. It needs zo2trl to be installed
(`pip install -e .` in a clone).
"""

from zo2trl.trainers.scripts import main

if __name__ == "__main__":
    main("reward")
