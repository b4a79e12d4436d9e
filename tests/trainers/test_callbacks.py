"""Callbacks of TRL that read parameters see the weights of the last step."""

from pathlib import Path
from typing import Any

import torch
from trl import BEMACallback

from tests.support.models import tiny_model
from tests.support.runs import STREAMED_FROM_CPU, closing, prompts, sft_trainer, weights_of


class Watching(BEMACallback):
    """This callback records the parameters when an average would be computed."""

    def __init__(self) -> None:
        super().__init__(update_freq=1)
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(weights_of(model))
        super().on_step_end(args, state, control, model=model, **kwargs)


def test_an_average_over_steps_is_taken_of_the_weights_of_each_step(tmp_path: Path) -> None:
    callback, wanted = Watching(), []
    options = {**STREAMED_FROM_CPU, "write_back_every": 1000, "learning_rate": 0.01, "max_steps": 3}
    with closing(
        sft_trainer(tmp_path / "watched", tiny_model("opt"), prompts(6), extra={"callbacks": [callback]}, **options)
    ) as trainer:
        trainer.train()
    for n_steps in (1, 2, 3):
        with closing(
            sft_trainer(tmp_path / f"{n_steps}", tiny_model("opt"), prompts(6), **{**options, "max_steps": n_steps})
        ) as trainer:
            trainer.train()
            wanted.append(weights_of(trainer.model))
    assert len(callback.seen) == 3
    for seen, weights in zip(callback.seen, wanted, strict=True):
        assert all(torch.equal(seen[name], weights[name]) for name in weights)
