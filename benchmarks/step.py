"""Measure what a step costs beyond its two forwards, with everything on the device.

    python -m benchmarks.step --out benchmarks/results/step_cpu.json

Three things are timed in one process, in turn: two plain forwards of the model, the noise a step draws (the plus
probe, the minus probe and the update each draw every trainable element once), and the whole step. The promise is

    step <= 1.25 x two forwards + noise
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._report import add_out, median_seconds, write_report
from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.engine.step import Engine
from zo2trl.planning.budgets import Budgets
from zo2trl.zo.chunks import chunks, draw

DRAWS_PER_STEP = 3


def make_model() -> LlamaForCausalLM:
    """Build a model of about 100 M parameters in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=13, num_attention_heads=12,
        num_key_value_heads=12, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def draw_all(engine: Engine) -> None:
    """Draw noise for every trainable element once, in the chunks of a step."""
    direction = engine.store.method.direction
    for segment in engine.store.layout.segments:
        for span in segment.spans:
            for tiles, _ in chunks(span.tiles, engine.store.device):
                draw(direction, 1, tiles, device=engine.store.device)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs=2, default=(2, 256), help="batch and length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--direction", default="rademacher")
    add_out(parser)
    options = parser.parse_args()

    model = make_model()
    ids = torch.randint(0, 8192, tuple(options.tokens))
    n_parameters = sum(p.numel() for p in model.parameters())

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    def two_forwards() -> None:
        with torch.no_grad():
            loss()
            loss()

    plain = median_seconds(two_forwards, repeats=3)  # without hooks, to show what they cost a plain forward
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(
            model,
            EngineOptions(
                budgets=Budgets(device=1 << 40, cpu=0), device=torch.device("cpu"), store_dir=Path(folder) / "store",
                seed=0, direction=options.direction,
            ),
        )  # fmt: skip
        rows: list[dict[str, float]] = []
        bare = make_model()
        for number in range(options.rounds):
            rows.append(_round(engine, bare, ids, number))
        engine.shutdown()
    report = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    write_report(
        options.out,
        parameters=n_parameters,
        tokens=ids.numel(),
        direction=options.direction,
        before_hooks_s=plain,
        **report,
    )


def _round(engine: Engine, bare: LlamaForCausalLM, ids: torch.Tensor, number: int) -> dict[str, float]:
    """Time one of each, close together in time, so that other load on the machine slows all of them."""

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(2):
                bare(input_ids=ids, labels=ids)

    def step() -> None:
        engine.step([lambda: engine.model(input_ids=ids, labels=ids).loss], step=number * 10 + step.calls)
        engine.commit(learning_rate=1e-6, weight_decay=0.0)
        step.calls += 1

    step.calls = 0
    forwards_s = median_seconds(forwards, repeats=1, warm_up=int(number == 0))
    noise_s = DRAWS_PER_STEP * median_seconds(lambda: draw_all(engine), repeats=1, warm_up=int(number == 0))
    step_s = median_seconds(step, repeats=2, warm_up=1)  # the first has no pending update to apply
    return {
        "two_forwards_s": forwards_s,
        "noise_s": noise_s,
        "step_s": step_s,
        "overhead_ratio": (step_s - noise_s) / forwards_s,
        "step_over_forwards_and_noise": step_s / (forwards_s + noise_s),
    }


if __name__ == "__main__":
    main()
