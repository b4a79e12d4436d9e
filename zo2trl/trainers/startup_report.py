"""What a trainer says when its first step begins: where weights live, what a step waits for, about how long it takes.

Does not: measure this machine: what `zo2trl plan` found is used, else rates of a machine like ours.
"""

import sys
from collections.abc import Mapping
from typing import Any

from zo2trl.engine.activations import n_tokens
from zo2trl.engine.opening import Plan
from zo2trl.forecast.forecast import forecast
from zo2trl.forecast.workload import rough_workload
from zo2trl.planning.rates import identity, load_rates, typical_rates

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
    measured = load_rates(identity(options.device, options.store_dir))
    found = forecast(
        Plan(layout=store.layout, placement=store.placement), options,
        rough_workload(store.layout, n_tokens=n_tokens(inputs)), rates=measured or typical_rates(options.device.type),
        n_micro_batches=n_micro_batches, tokens=n_tokens(inputs) * n_micro_batches,
        passes_per_traversal=trainer.device_fit.passes_per_traversal(inputs),
    )  # fmt: skip
    basis = "" if measured else " on a machine like ours (`zo2trl plan` measures this one)"
    return f"zo2trl: {store.summary()}; about {found.step_s:.2g} s a step, bound by {found.bound}{basis}"
