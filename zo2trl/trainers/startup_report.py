"""The start-up line of a trainer: where weights live, what a step waits for, and about how long it takes.

Does not: measure this machine, or compute anything that `zo2trl plan` computes otherwise.
"""

import sys
from collections.abc import Mapping
from typing import Any

from zo2trl.engine.activations import n_tokens
from zo2trl.engine.opening import Plan
from zo2trl.forecast.forecast import forecast

__all__ = ["announce", "one_line_forecast"]


def announce(trainer: Any, inputs: Mapping[str, Any], *, n_micro_batches: int) -> None:
    """Print the line to stderr, where progress bars go, unless these are off.

    Args:
        inputs: the largest micro-batch.
        n_micro_batches: of a step, in this process.
    """
    if not trainer.args.disable_tqdm:
        line = one_line_forecast(trainer, inputs, n_micro_batches=n_micro_batches)
        trainer.accelerator.print(line, file=sys.stderr)


def one_line_forecast(trainer: Any, inputs: Mapping[str, Any], *, n_micro_batches: int) -> str:
    """The line itself; see `announce`."""
    store, options = trainer.engine.store, trainer.device_fit.options
    plan = Plan(layout=store.layout, placement=store.placement)
    time = forecast(plan, options, tokens=n_tokens(inputs) * n_micro_batches).time
    where = f"zo2trl: {store.summary()}"
    if time is None:
        return f"{where}; the step time is unknown until `zo2trl plan` has measured this machine"
    basis = (
        f" by rates of the {options.rates.name} (`zo2trl plan` measures this machine)" if options.rates.name else ""
    )
    return f"{where}; about {time.step_s:.2g} s a step, bound by {time.bound}{basis}"
