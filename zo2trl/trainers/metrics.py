"""This module computes what logs show of ZO steps: means since the last log, under keys that users rely on."""

import math
from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch

from zo2trl.zo.estimators import Estimate

__all__ = ["LOG_KEYS", "StepMetrics", "count_tokens"]

_LINKS = ("h2d", "d2h", "disk_read", "disk_written")

LOG_KEYS = {
    "loss": "Mean of the losses at the plus and the minus probes.",
    "grad_norm": "Absolute projected gradient of the last step.",
    "zo/projected_grad": "Projected gradient: the slope of the loss along the direction, averaged over directions.",
    "zo/loss_plus": "Loss at the plus probes.",
    "zo/loss_minus": "Loss at the minus probes.",
    "zo/tokens_per_second": "Tokens that are not padding, divided by the time of the steps.",
    "zo/bytes_h2d": "Bytes that a step copies from host memory to the device.",
    "zo/bytes_d2h": "Bytes that a step copies from the device to host memory.",
    "zo/bytes_disk_read": "Bytes that a step reads from the disk.",
    "zo/bytes_disk_written": "Bytes that a step writes to the disk.",
    "objective/<name>": "The objective, where one replaces the loss: mean of its values at the plus and minus probes.",
    "eval_objective/<name>": "The objective on the evaluation data.",
}
"""Every key that a ZO trainer adds to the logs or redefines; docs/reference/log_keys.md is generated from it."""


class StepMetrics:
    """StepMetrics sums over steps; `take` returns means and starts again."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._estimates: list[tuple[float, float, float]] = []
        self._n_steps = 0

    def add_work(self, *, n_tokens: int, seconds: float, moved: Mapping[str, int]) -> None:
        """Add the cost of one optimizer step; `moved` is bytes per link."""
        self._sums.update({"steps": 1, "tokens": n_tokens, "microseconds": round(seconds * 1e6)})
        self._sums.update({link: moved.get(link, 0) for link in _LINKS})

    def add(self, estimate: Estimate) -> None:
        """Add the estimate of one optimizer step, also a retraced one. A loss that is not finite changes no mean."""
        self._n_steps += 1
        if estimate.is_finite:
            self._estimates.append((estimate.projected_grad, estimate.loss_plus, estimate.loss_minus))

    def take(self) -> dict[str, float]:
        """Return the `zo/*` entries for one log, or nothing if no step was made since the last."""
        sums, estimates, n_steps = self._sums, self._estimates, self._n_steps
        self._sums, self._estimates, self._n_steps = Counter(), [], 0
        if not n_steps:
            return {}
        columns = zip(*estimates, strict=True) if estimates else [(math.nan,)] * 3
        means: dict[str, float] = dict(
            zip(("projected_grad", "loss_plus", "loss_minus"), map(fmean, columns), strict=True)
        )
        if sums["steps"]:  # at least one step was not retraced
            if sums["tokens"]:  # inputs such as pixels have no tokens
                means["tokens_per_second"] = sums["tokens"] / max(sums["microseconds"] / 1e6, 1e-6)
            means |= {f"bytes_{link}": sums[link] / sums["steps"] for link in _LINKS}
        return {f"zo/{name}": value for name, value in means.items()}

    def state(self) -> dict[str, Any]:
        """Return the sums since the last log, as JSON."""
        return {"sums": dict(self._sums), "estimates": self._estimates, "n_steps": self._n_steps}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._sums, self._n_steps = Counter(state["sums"]), state["n_steps"]
        self._estimates = [(row[0], row[1], row[2]) for row in state["estimates"]]


def count_tokens(inputs: Mapping[str, Any]) -> int:
    """Count the tokens of a batch that are not padding: the attention mask's sum, or all of `input_ids`."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor):
        return int(mask.sum())
    ids = inputs.get("input_ids")
    return ids.numel() if isinstance(ids, torch.Tensor) else 0
