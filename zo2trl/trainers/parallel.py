"""This module defines ParallelMixin, with which several processes (`torchrun`, `accelerate launch`) make one training.

Does not: send messages by itself (parallel/ranks.py does), or wrap the model: weights stay equal because every process
makes the same steps from the same losses.

Each process has its own store, in `store_dir/rank-N`; a single process has `store_dir` itself.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from transformers import Trainer

from zo2trl.engine.opening import has_run
from zo2trl.errors import ConfigError, RanksDiverged, UnsupportedError
from zo2trl.parallel.ranks import ALONE, Ranks, join_ranks
from zo2trl.trainers.metrics import count_tokens

__all__ = ["ParallelMixin", "refuse_other_world_size"]

_TRANSPORT_ERROR = re.compile(r"Dist\w*Error|gloo|NCCL|Connection (closed|reset)|Broken pipe", re.IGNORECASE)

_Base = Trainer if TYPE_CHECKING else object


class ParallelMixin(_Base):
    """ParallelMixin is the part of `ZOTrainerMixin` that coordinates several processes."""

    args: Any
    ranks: Ranks = ALONE

    def _join_ranks(self, config: Any) -> None:
        """Connect to the other processes; every process calls this first."""
        _check_parallelism(config)
        if config.parallelism == "directions" and config.world_size > 1:
            # Upstream would add up the items of all processes, but these have the same items.
            config.average_tokens_across_devices = False
        self.ranks = join_ranks(config.parallelism, patience_s=config.ddp_timeout)

    @property
    def _own_store_dir(self) -> Path:
        folder = self.args.store_path
        return folder if self.ranks.size == 1 else folder / _rank_folder(self.ranks.rank)

    def _agree_on_step(self, batches: Sequence[Any], passes_per_traversal: int) -> tuple[int, int]:
        """Return passes per traversal that fit in every process, and the tokens that all processes have in this step.

        Raises:
            RanksDiverged: the processes should have the same micro-batches, and do not.
        """
        n_tokens, ranks = sum(map(count_tokens, batches)), self.ranks
        if ranks.size == 1:
            return passes_per_traversal, n_tokens
        name = 0 if ranks.parallelism == "data" else _crc_of(batches)
        rows = ranks.gather(f"step {self.state.global_step}", [passes_per_traversal, n_tokens, name])
        least, tokens = min(row[0] for row in rows), [row[1] for row in rows]
        if other := [rank for rank, row in enumerate(rows) if row[2] != rows[0][2]]:
            raise RanksDiverged(
                f'`parallelism="directions"` needs the same micro-batches in all processes, and at step '
                f"{self.state.global_step} those of rank {other[0]} are not those of rank 0: something in the data "
                "pipeline draws random numbers that depend on the process. Let it draw the same ones, or use "
                '`parallelism="data"`.'
            )
        return int(least), int(sum(tokens) if ranks.parallelism == "data" else tokens[0])

    @contextmanager
    def _without_gathering(self) -> Iterator[None]:
        """Make accelerate's gathering return a process's own values, because the others evaluate nothing now."""
        accelerator, own = self.accelerator, ("gather", "gather_for_metrics", "reduce")
        if self.ranks.size > 1:
            for name in own:
                setattr(accelerator, name, lambda value, *args, **kwargs: value)
        try:
            yield
        finally:
            for name in own:
                accelerator.__dict__.pop(name, None)

    @contextmanager
    def _naming_lost_rank(self) -> Iterator[None]:
        """Convert a transport error into one that names the lost rank.

        Upstream gathers values between our messages; that fails with the transport's own words if a process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            if self.ranks.size > 1 and _TRANSPORT_ERROR.search(f"{type(error).__name__}: {error}"):
                raise self.ranks.lost(f"step {self.state.global_step}", error) from error
            raise

    # -- hooks of the Trainer

    def get_train_dataloader(self) -> Any:
        """See [`~transformers.Trainer.get_train_dataloader`].

        With direction parallelism every process gets all batches.
        """
        if self.ranks.n_shares_of_data == self.ranks.size:
            return super().get_train_dataloader()  # type: ignore[misc]
        accelerator: Any = self.accelerator
        accelerator.prepare_data_loader = partial(_prepare_undivided, accelerator)
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            del accelerator.prepare_data_loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Count the rows in the micro-batches of a step, over all processes that have different ones."""
        total = super().get_total_train_batch_size(args)  # type: ignore[misc]
        return total * self.ranks.n_shares_of_data // self.ranks.size

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen * self.ranks.n_shares_of_data // self.ranks.size


def refuse_other_world_size(store_dir: Path, ranks: Ranks) -> None:
    """Refuse a folder whose run was made by another number of processes: two runs in one folder would be mixed up.

    Raises:
        ConfigError: the message names both numbers and the way out.
    """
    n_found = len([path for path in store_dir.glob("rank-*") if has_run(path)]) or int(has_run(store_dir))
    is_whole = has_run(store_dir)
    fits = not n_found or (is_whole == (ranks.size == 1) and n_found <= ranks.size)
    if not fits:
        n_made = 1 if is_whole else n_found
        raise ConfigError(
            f"`store_dir` {store_dir} holds a run made by {n_made} process{'es' if n_made > 1 else ''}, and there are "
            f"{ranks.size} now, which take other shares of the data. Launch {n_made} to go on with it; else take its "
            "weights (`zo2trl export`) and begin another run in another `store_dir`."
        )


def _rank_folder(rank: int) -> str:
    return f"rank-{rank}"


def _check_parallelism(config: Any) -> None:
    n_ranks = config.world_size
    if n_ranks == 1:
        return
    loading = config.accelerator_config
    if config.parallelism == "directions":
        if config.num_directions % n_ranks:
            raise ConfigError(
                f"`num_directions` is {config.num_directions}, which {n_ranks} processes cannot share evenly with "
                f'`parallelism="directions"`. Make it a multiple of {n_ranks}.'
            )
        if config.train_sampling_strategy == "batch_rebalance" or loading.dispatch_batches or loading.split_batches:
            raise UnsupportedError(
                '`parallelism="directions"` gives all processes the same batches, so batches cannot be divided: leave '
                '`train_sampling_strategy="batch_rebalance"`, `dispatch_batches` and `split_batches` out.'
            )
    if config.auto_find_batch_size:
        raise UnsupportedError(
            "`auto_find_batch_size=True` cannot work with several processes: one of them may need a smaller batch "
            "than the others. Find it in one process, and set `per_device_train_batch_size`."
        )
    if not loading.even_batches:
        raise UnsupportedError(
            "`accelerator_config` has `even_batches=False`, so some processes would run out of batches before others. "
            "Leave it out, or set `dataloader_drop_last=True`."
        )


def _crc_of(batches: Sequence[Any]) -> int:
    """Compute the checksum of all tensors in some batches."""
    crc = 0
    for inputs in batches:
        for name in sorted(name for name, value in inputs.items() if isinstance(value, torch.Tensor)):
            crc = zlib.crc32(inputs[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), crc)
    return crc


def _prepare_undivided(accelerator: Any, data_loader: Any, device_placement: Any = None, **_: Any) -> Any:
    """Prepare a dataloader as `Accelerator.prepare_data_loader` does in a single process."""
    placed = accelerator.device_placement if device_placement is None else device_placement
    prepared = prepare_data_loader(
        data_loader, accelerator.device, num_processes=1, process_index=0, put_on_device=placed,
        rng_types=accelerator.rng_types.copy(), dispatch_batches=False, even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler, data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking, use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )  # fmt: skip
    accelerator._dataloaders.append(prepared)
    return prepared
