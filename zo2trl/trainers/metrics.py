"""What the logs say about ZO steps: means since the last log, under the names users and dashboards rely on."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from zo2trl.zo.estimators import Estimate

__all__ = ["StepMetrics", "count_tokens"]

_LINKS = ("h2d", "d2h", "disk_read", "disk_written")


class StepMetrics:
    """Sums over steps; `take` returns means and starts again."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._n_steps = 0

    def add(self, estimate: Estimate, *, n_tokens: int, seconds: float, moved: Mapping[str, int]) -> None:
        """Note one optimizer step; `moved` is bytes per link."""
        self._n_steps += 1
        values = {
            "projected_grad": estimate.projected_grad, "loss_plus": estimate.loss_plus,
            "loss_minus": estimate.loss_minus, "tokens": n_tokens, "seconds": seconds,
        }  # fmt: skip
        for name, value in values.items():
            self._sums[name] += value  # type: ignore[assignment]
        for link in _LINKS:
            self._sums[f"bytes_{link}"] += moved.get(link, 0)

    def take(self) -> dict[str, float]:
        """The `zo/*` entries for one log, or nothing if no step was made since the last."""
        sums, n_steps = self._sums, self._n_steps
        self._sums, self._n_steps = Counter(), 0
        if not n_steps:
            return {}
        means = {name: sums[name] / n_steps for name in ("projected_grad", "loss_plus", "loss_minus")}
        means["tokens_per_second"] = sums["tokens"] / sums["seconds"]
        means |= {f"bytes_{link}": sums[f"bytes_{link}"] / n_steps for link in _LINKS}
        return {f"zo/{name}": value for name, value in means.items()}


def count_tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding: the attention mask's sum, or all of `input_ids`."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor):
        return int(mask.sum())
    ids = inputs.get("input_ids")
    return ids.numel() if isinstance(ids, torch.Tensor) else 0
