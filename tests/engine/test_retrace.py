"""Promises of a loop without a Trainer: stopped anywhere, it goes on to the bits of one that never stopped."""

import pytest
import torch

from tests.support.toys import TIERS, Toy, assert_same_weights, batch, options, toy, weights_of
from zo2trl.engine.loop_notes import compare_settings, note_evaluation, note_measured, note_start, random_state_at
from zo2trl.engine.opening import open_engine
from zo2trl.engine.retrace import Retrace, StartPoint, locate, refuse_changed_weights, refuse_other_rates
from zo2trl.engine.step import Engine
from zo2trl.errors import CheckpointError, ConfigError

STEPS = 7


def rate(step: int) -> float:
    """A schedule: another learning rate in every step."""
    return 0.005 / (1 + step)


def begin(folder, **choices) -> tuple[Toy, Engine]:
    model = toy()
    engine = open_engine(model, options(folder, **choices))
    note_start(engine, 0, randomness=torch.get_rng_state().tolist(), settings={"batch size": 2, "zo_eps": 1e-3})
    return model, engine


def reopen(folder, **choices) -> tuple[Toy, Engine]:
    model = toy()
    return model, open_engine(model, options(folder, **choices), mode="continue")


def loop(model: Toy, engine: Engine, *, retrace: Retrace | None = None, stop: int = STEPS, rates=rate) -> list:
    """A plain training loop; the losses of its steps, journaled or new."""
    losses = []
    for step in range(stop):
        ids = batch(step)
        if retrace is not None and not retrace.is_over:
            estimate = retrace.estimate
            retrace.advance(learning_rate=rates(step))
        else:
            estimate = engine.step([lambda ids=ids: model(ids)], step=step)
            engine.commit(learning_rate=rates(step), weight_decay=0.0)
        losses.append((estimate.loss_plus, estimate.loss_minus))
    return losses


def kill(engine: Engine) -> None:
    """End a run without a flush: what the journal does not hold is lost."""
    engine.shutdown(flush=False)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("stopped_after", [0, 4, STEPS])
def test_a_stopped_loop_goes_on_to_the_losses_and_bits_of_an_uninterrupted_one(tmp_path, tier, stopped_after):
    choices = {"tier": tier, "write_back_every": 3}
    whole, engine = begin(tmp_path / "whole", **choices)
    losses = loop(whole, engine)
    engine.shutdown()
    model, engine = begin(tmp_path / "store", **choices)
    loop(model, engine, stop=stopped_after)
    kill(engine)
    model, engine = reopen(tmp_path / "store", **choices)
    retrace = Retrace(engine, locate(StartPoint(), engine))
    assert retrace.n_left == stopped_after
    assert loop(model, engine, retrace=retrace) == losses
    assert retrace.is_over and len(engine.store.records) == STEPS
    engine.shutdown()
    assert_same_weights(model, weights_of(whole))


def test_retracing_runs_no_forward_and_moves_no_weight(tmp_path):
    model, engine = begin(tmp_path / "store")
    loop(model, engine)
    engine.shutdown()
    model, engine = reopen(tmp_path / "store")
    engine.flush()
    before, traffic = weights_of(model), engine.store.traffic.copy()
    loop(model, engine, retrace=Retrace(engine, locate(StartPoint(), engine)))
    assert engine.visited == [] and engine.store.traffic == traffic
    assert_same_weights(model, before)
    engine.shutdown()


def test_another_learning_rate_is_refused_at_its_step(tmp_path):
    model, engine = begin(tmp_path / "store")
    loop(model, engine, stop=3)
    kill(engine)
    model, engine = reopen(tmp_path / "store")
    retrace = Retrace(engine, start := locate(StartPoint(), engine))
    with pytest.raises(ConfigError, match=r"Step 2 was made at learning rate .* `learning_rate`, the schedule"):
        loop(model, engine, retrace=retrace, rates=lambda step: rate(step) if step < 2 else 0.1)
    assert retrace.position == 2, "a refused step is not passed"
    after = StartPoint(position=3, step_offset=start.step_offset)
    refuse_other_rates(after, engine, rate_at=rate)
    with pytest.raises(ConfigError, match="Step 0 was made"):
        refuse_other_rates(after, engine, rate_at=lambda step: 0.1)
    engine.shutdown()


def test_what_a_loop_notes_comes_back_where_it_was_noted(tmp_path):
    model, engine = begin(tmp_path / "store")
    for step in range(3):
        engine.step([lambda: model(batch(0))], step=step)
        note_measured(engine, {"accuracy": step / 4})
        engine.commit(learning_rate=rate(step), weight_decay=0.0)
        if step == 1:
            note_evaluation(engine, "eval", {"eval_loss": 2.5}, step=step + 1)
    kill(engine)
    _, engine = reopen(tmp_path / "store")
    start = locate(StartPoint(), engine)
    assert random_state_at(engine, start.position) == torch.get_rng_state().tolist()
    retrace = Retrace(engine, start)
    for step in range(3):
        assert retrace.measured() == {"accuracy": step / 4}
        retrace.advance(learning_rate=rate(step))
        assert retrace.evaluation("eval") == ({"eval_loss": 2.5} if step == 1 else None)
        assert retrace.had_evaluation == (step == 1)
    engine.shutdown()


def test_settings_that_find_another_place_in_the_data_are_refused_and_others_warned_about(tmp_path, caplog):
    _, engine = begin(tmp_path / "store")
    compare_settings(engine, {"batch size": 2, "zo_eps": 1e-3})
    assert not caplog.records
    compare_settings(engine, {"batch size": 2, "zo_eps": 1e-2}, may_change=["zo_eps"])
    assert "`zo_eps` was 0.001 when this training began and is 0.01 now" in caplog.text
    with pytest.raises(ConfigError, match="`batch size` was 2 when this training began and is 3 now"):
        compare_settings(engine, {"batch size": 3}, may_change=["zo_eps"])
    engine.shutdown()


def test_a_point_of_another_run_or_of_another_history_is_refused(tmp_path):
    model, engine = begin(tmp_path / "store")
    loop(model, engine, stop=3)
    journal = engine.store.journal
    mine = StartPoint(
        folder=tmp_path / "point",
        store_id=str(journal.header["store"]),
        fingerprint=journal.fingerprint(2),
        position=2,
    )
    assert locate(mine, engine) == mine
    assert loop_from(engine, locate(mine, engine)) == [2]
    with pytest.raises(CheckpointError, match="belongs to run 0000"):
        locate(StartPoint(folder=tmp_path / "point", store_id="0" * 32), engine)
    with pytest.raises(CheckpointError, match="of another history"):
        locate(StartPoint(folder=tmp_path / "point", store_id=mine.store_id, fingerprint="other", position=2), engine)
    engine.shutdown()


def loop_from(engine: Engine, start: StartPoint) -> list[int]:
    """Numbers of the steps that are retraced from a point."""
    retrace, steps = Retrace(engine, start), []
    while not retrace.is_over:
        steps.append(retrace.record.step - start.step_offset)
        retrace.advance(learning_rate=rate(steps[-1]))
    return steps


def test_writing_into_weights_while_steps_are_retraced_is_refused(tmp_path):
    model, engine = begin(tmp_path / "store", tier="gpu")
    loop(model, engine, stop=2)
    kill(engine)
    model, engine = reopen(tmp_path / "store", tier="gpu")
    refuse_changed_weights(engine, step=0, advice="Do not.")
    with torch.no_grad():
        model.head.weight.add_(1.0)
    with pytest.raises(ConfigError, match=r"Weights were changed around step 1, which is gone through again.*Do not"):
        refuse_changed_weights(engine, step=1, advice="Do not.")
    assert not engine.store.is_open
