"""Power cuts at every operation of a store: whatever survives, the store opens to the state before or after it.

Every image is opened the way a resumed training opens it, and every unit's weights are compared with those of an
in-memory reference that absorbed the same records one by one.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.covering import few_in_ci
from tests.support.crash_fs import CrashFS, CrashImage
from tests.support.durable import (
    Action,
    Player,
    QuickFS,
    Setup,
    State,
    listing,
    make_record,
    small_layout,
    state_of,
    steps,
    visit,
)

TRAINING = [*steps(1, 12), Action("flush")]
# Weights from outside, history taken back, over the end of a process.
HISTORY = [
    *steps(1, 4), Action("replace", 1), *steps(5, 7), Action("back", 6), *steps(7, 8), Action("back", 2),
    *steps(3, 5), Action("reopen"), Action("back", 3), *steps(4, 7), Action("replace", 2), Action("flush"),
    Action("reopen"), *steps(8, 9),
]  # fmt: skip
# Runs begun over an earlier one: it comes back unless the new one has made a step.
BEGINNINGS = [
    *steps(1, 3), Action("begin"), Action("visit"), Action("reopen"), *steps(4, 4), Action("begin"), *steps(1, 2),
    Action("begin"), Action("begin"), *steps(1, 1),
]  # fmt: skip

SETUPS = {
    "whole blocks": Setup(),
    "by leaf": Setup(layout=small_layout(by_leaf=True)),
    "base elsewhere": Setup(layout=small_layout(frozen=True), keep_base=False),
    "synced every third step": Setup(sync_every=3),
    "everything on disk": Setup(tiers=("gpu", "disk", "disk", "disk"), write_back=1),
    "everything in memory": Setup(tiers=("gpu", "cpu", "cpu", "gpu"), snapshot=2),
}

EVERY = 6  # operations between two cuts of one test

one_thread, tmp_path = processes.one_thread, processes.tmp_path_in_memory


class Trial:
    """A workload whose power is cut."""

    def __init__(self, setup: Setup, actions: Sequence[Action], tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        self.setup, self.actions, self.folder = setup, actions, tmp_path / "image"
        self.fs = CrashFS(tmp_path / "disk")
        player = Player(setup, self.fs.root / "store", fs=self.fs, promised=self.fs.note)
        try:
            player.play(actions)
        finally:
            player.close()
        self.states, self.promises = player.oracle.states, player.oracle.promises
        self.n_images = self.n_different = 0

    def check_all(self, *, n_random: int, seed: int = 0, every: int = 1) -> "Trial":
        """The images after every (`every`-th) operation, each different one once."""
        seen: set[tuple[str, int]] = set()
        for image in self.fs.images(n_random=n_random, seed=seed):
            if (image.after + seed) % every:
                continue
            self.n_images += 1
            key = (image.digest, len(image.notes))
            if key not in seen:
                seen.add(key)
                self.check(image, deeply=self.n_different % 8 == 0)
                self.n_different += 1
        return self

    def check(self, image: CrashImage, *, deeply: bool) -> None:
        path = image.write_to(self.folder) / "store"
        try:
            if not image.notes:
                if deeply:
                    self._begin_over_what_is_left(path)
                return
            if deeply and (path / "journal").exists():
                before = listing(path)
                with self.setup.opened(path, mode="read", fs=QuickFS()) as store:
                    assert state_of(store) in self._allowed(image)
                assert listing(path) == before, "reading changed something"
            with self.setup.opened(path, mode="continue", fs=QuickFS()) as store:
                state = state_of(store)
                assert state in self._allowed(image), f"{state} is none of {list(map(str, self._allowed(image)))}"
                self._check_files(path)
            if deeply:
                self._go_on(path, state)
        except Exception as error:
            raise AssertionError(f"{error}\n{image}:\n{self.fs.story(image.after)}") from error

    def _allowed(self, image: CrashImage) -> list[State]:
        """The promised state, those on the way to the next promise, and those that need not be synced yet."""
        number = len(image.notes) - 1  # of the last action that was over
        oldest = number
        if self.setup.sync_every > 1:
            n_unsynced = self.setup.sync_every - 1
            while oldest > 0 and n_unsynced > 0 and self.actions[oldest - 1].kind not in ("reopen", "begin"):
                n_unsynced -= self.actions[oldest - 1].kind in ("step", "skip")
                oldest -= 1
        promises = [*self.promises, len(self.states) - 1]
        return self.states[promises[oldest] : promises[number + 1] + 1]

    def _begin_over_what_is_left(self, path: Path) -> None:
        player = Player(self.setup, path, fs=QuickFS())
        try:
            player.play([*steps(1, 2), Action("reopen")])
            assert state_of(player.store) == player.oracle.states[-1]
        finally:
            player.close()

    def _go_on(self, path: Path, state: State) -> None:
        """What was opened takes more steps, durably."""
        with self.setup.opened(path, mode="continue", fs=QuickFS()) as store:
            assert state_of(store) == state, "opening it again shows something else"
            last = state.records[-1].step if state.records else 0
            for step in (last + 1, last + 2):
                store.append(make_record(step, seed=step + 77))
                visit(store)
            store.flush()
            after = state_of(store)
        with self.setup.opened(path, mode="continue", fs=QuickFS()) as store:
            assert state_of(store) == after

    def _check_files(self, path: Path) -> None:
        """Opening removes what a crash left behind: a store does not grow with every crash."""
        n_units = len(self.setup.layout.units)
        n_files = len(list((path / "units").iterdir()))
        assert n_files <= 4 * n_units, f"{n_files} unit files for {n_units} units"


@pytest.mark.parametrize(
    ("n_random", "every", "n_images", "n_different"),
    [(1, 2, 120, 50), pytest.param(8, 1, 1100, 300, marks=pytest.mark.nightly)],
)
def test_a_training_of_12_steps_survives_a_power_cut_at_every_operation(
    tmp_path: Path, n_random: int, every: int, n_images: int, n_different: int
) -> None:
    """CI cuts the power after every other operation, the night after each of them."""
    trial = Trial(SETUPS["whole blocks"], TRAINING, tmp_path).check_all(n_random=n_random, every=every)
    assert trial.n_images >= n_images
    assert trial.n_different >= n_different


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, EVERY))])
@pytest.mark.parametrize("name", [name for name in SETUPS if name != "whole blocks"])
def test_so_it_does_however_the_store_is_set_up(tmp_path: Path, name: str, seed: int) -> None:
    """CI cuts the power after every sixth operation, the night after each of them."""
    Trial(SETUPS[name], [*steps(1, 7), Action("flush")], tmp_path).check_all(n_random=1, seed=seed, every=EVERY)


@pytest.mark.parametrize("every", few_in_ci(7, 3))
@pytest.mark.parametrize(
    ("name", "seed"), [("by leaf", 1), pytest.param("whole blocks", 0, marks=pytest.mark.nightly)]
)
def test_history_that_is_replaced_or_taken_back_is_so_whole_or_not_at_all(
    tmp_path: Path, name: str, seed: int, every: int
) -> None:
    Trial(SETUPS[name], HISTORY, tmp_path).check_all(n_random=2, seed=seed, every=every)


@pytest.mark.parametrize("every", few_in_ci(5, 2))
def test_a_run_begun_over_another_counts_from_its_first_step_and_not_before(tmp_path: Path, every: int) -> None:
    Trial(SETUPS["whole blocks"], BEGINNINGS, tmp_path).check_all(n_random=2, every=every)


@pytest.mark.parametrize("n_firsts", few_in_ci(4, 9))
def test_a_second_power_cut_while_the_store_is_opened_again_is_no_worse(tmp_path: Path, n_firsts: int) -> None:
    trial = Trial(
        SETUPS["whole blocks"],
        [*HISTORY[:9], Action("back", 2), *steps(3, 4), Action("begin"), Action("visit"), *steps(1, 1)],
        tmp_path,
    )
    images = [image for image in trial.fs.images(n_random=1, seed=5) if image.notes]
    for number, image in enumerate(images[:: max(len(images) // n_firsts, 1)]):
        fs = CrashFS(image.write_to(trial.folder))
        with trial.setup.opened(fs.root / "store", mode="continue", fs=fs) as store:
            state = state_of(store)
        for second in fs.images(n_random=1, seed=number):
            path = second.write_to(tmp_path / "second") / "store"
            with trial.setup.opened(path, mode="continue", fs=QuickFS()) as store:
                assert state_of(store) == state, f"{image}, then {second}:\n{fs.story(second.after)}"
        shutil.rmtree(trial.folder)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(20))
def test_many_more_power_cuts(tmp_path: Path, seed: int) -> None:
    name = list(SETUPS)[seed % len(SETUPS)]
    actions = (TRAINING, HISTORY, BEGINNINGS)[seed % 3]
    trial = Trial(SETUPS[name], actions, tmp_path).check_all(n_random=12, seed=seed)
    assert trial.n_images >= 1000
