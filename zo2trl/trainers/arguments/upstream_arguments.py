"""This module lists every argument of upstream's configs as supported, without effect, or refused in ZO training.

Does not: look at a config (refusals.py), or render the table (support_page.py).
Invariant: a field of an upstream config is in exactly one of the three tables, and
tests/trainers/arguments/test_refusals.py fails on one that is in none.
"""

__all__ = ["AS_UPSTREAM", "REFUSED", "SUPPORTED", "WITHOUT_EFFECT"]

_NO_BACKWARD = "there is no backward pass"
_NO_OPTIMIZER = "a step is stochastic gradient descent on the projected gradient, without optimizer state"
_NOT_COMPILED = "the weights of a block move between passes, so the model is run as it is"
_NOT_WRAPPED = "models are not wrapped in DDP"
_NO_LIGER = "its kernels replace forwards that wait for weights; logits are computed a few rows at a time anyway"
_OWN_PARAMETERS = "owns the parameters, and so does the tiered store. Remove it: the store already spreads them."

AS_UPSTREAM = "as upstream"

SUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        # transformers.TrainingArguments
        """
        output_dir per_device_train_batch_size num_train_epochs max_steps lr_scheduler_kwargs warmup_steps
        gradient_accumulation_steps label_smoothing_factor bf16 tf32 use_cache
        torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
        logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to
        run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
        per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps include_for_metrics batch_eval_metrics save_strategy save_steps save_on_each_node
        save_total_limit hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
        load_best_model_at_end metric_for_best_model greater_is_better restore_callback_states_from_checkpoint
        full_determinism data_seed accelerator_config dataloader_drop_last dataloader_num_workers
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
        train_sampling_strategy length_column_name ddp_backend skip_memory_metrics do_train do_eval
        do_predict resume_from_checkpoint local_rank
        """.split(),
        AS_UPSTREAM,
    ),
    **dict.fromkeys(
        # trl.SFTConfig, and fields that DPOConfig and RewardConfig share with it
        """
        router_aux_loss_coef chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token
        max_length truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of
        eval_packing completion_only_loss assistant_only_loss loss_type pad_token
        """.split(),
        AS_UPSTREAM,
    ),
    **dict.fromkeys(
        # trl.DPOConfig and trl.RewardConfig
        """
        precompute_ref_batch_size loss_weights ld_alpha f_divergence_type
        f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau center_rewards_coefficient
        """.split(),
        AS_UPSTREAM,
    ),
    "learning_rate": "default 1e-6: a projected gradient is much larger than a gradient",
    "lr_scheduler_type": 'default `"constant"`',
    "weight_decay": "decoupled, on the parameters that transformers decays",
    "max_grad_norm": "default 0; if positive, clips the projected gradient to this absolute value",
    "fp16": "autocast as upstream; there are no gradients to scale",
    "use_cpu": "as upstream; the three tiers are then main memory twice and the disk",
    "seed": "as upstream; directions are drawn from it as well",
    "auto_find_batch_size": (
        "as upstream, in one process (refused with several): with a smaller batch, training begins again on the "
        "weights so far. To resume it, set `per_device_train_batch_size` to what was found"
    ),
    "average_tokens_across_devices": (
        'as upstream; off with `parallelism="directions"`, where all processes have the same tokens'
    ),
    "ddp_timeout": "seconds that a process waits for the others, in every step, before it stops with an error",
    "ignore_data_skip": "as upstream, so that a resumed run sees other data than an uninterrupted one",
    "save_only_model": "checkpoints hold the weights, and no state to resume from; the journal still has every step",
    "push_to_hub": "as upstream; the store is left out of what is uploaded",
    "debug": "`underflow_overflow` as upstream, in every probe; a non-finite loss is skipped and reported without it",
    "model_init_kwargs": (
        "`dtype`, `revision` and the like as upstream; the checkpoint's own dtype is the default. Arguments that "
        "place or shard the model are refused"
    ),
    "precompute_ref_log_probs": "as upstream; switched on without adapters, so that no second copy is ever made",
    "trust_remote_code": "as upstream, for folders with code in them too",
}
"""Field -> how it behaves here."""

WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        """
        gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
        """.split(),
        _NO_BACKWARD,
    ),
    **dict.fromkeys("optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon".split(), _NO_OPTIMIZER),
    **dict.fromkeys("torch_compile torch_compile_backend torch_compile_mode".split(), _NOT_COMPILED),
    **dict.fromkeys(
        "ddp_static_graph ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers".split(), _NOT_WRAPPED
    ),
    **dict.fromkeys("use_liger_kernel liger_kernel_config".split(), _NO_LIGER),
    "neftune_noise_alpha": "probes run without any random noise but their own, in eval mode",
    "disable_dropout": "probes run without dropout, whatever is set",
    "enable_jit_checkpoint": "SIGTERM stops training with every finished step in the journal: nothing is left to save",
}
"""Field -> why it changes nothing. A value other than the default is warned about."""

REFUSED: dict[str, str] = {
    "deepspeed": f"DeepSpeed {_OWN_PARAMETERS}",
    "fsdp": f"FSDP {_OWN_PARAMETERS}",
    "fsdp_config": f"FSDP {_OWN_PARAMETERS}",
    "parallelism_config": f"Tensor or context parallelism {_OWN_PARAMETERS}",
    **{
        f"{short}_full_eval": (
            f"it would convert the whole model in memory. Store the weights in that dtype instead "
            f'(`model_init_kwargs={{"dtype": "{name}"}}`), or evaluate under autocast (`bf16=True`).'
        )
        for short, name in (("bf16", "bfloat16"), ("fp16", "float16"))
    },
    "activation_offloading": f"{_NO_BACKWARD}, so no activations are kept that could be moved away. Remove it.",
    **dict.fromkeys(
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps".split(),
        "a reference that follows the model is a second set of weights, and there is one in the store. Remove it, or "
        "train in several runs, each with the result of the one before as its reference.",
    ),
}
"""Field -> why it cannot work, and the way out. A value other than the default is refused."""
