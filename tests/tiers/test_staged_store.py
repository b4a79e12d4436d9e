"""A whole store whose segments go through pieces of staging memory, read ahead of their slots, as with a GPU."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.covering import every_pair
from tests.support.durable import Action, Player, QuickFS, Setup, small_layout, steps
from tests.support.faulty_fs import FaultyFS
from tests.support.processes import single_threaded
from zo2trl.errors import StoreError
from zo2trl.planning.budgets import TierName
from zo2trl.tiers import readers, staging, transfers
from zo2trl.tiers.staging import Staging

MIXES: tuple[tuple[TierName, ...], ...] = (
    ("gpu", "disk", "disk", "disk"),
    ("gpu", "disk", "cpu", "disk"),
    ("gpu", "cpu", "cpu", "disk"),
    ("gpu", "cpu", "gpu", "disk"),
)
LIFE = [*steps(1, 7), Action("change", 3), *steps(8, 12), Action("flush"), *steps(13, 14), Action("back", 9)]
LIFE += [*steps(15, 18), Action("reopen"), *steps(19, 40), Action("replace", 4), *steps(41, 44), Action("flush")]


class QuickFaultyFS(FaultyFS, QuickFS):
    """Does not wait for the drive."""


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Staging]]:
    made: list[Staging] = []

    def build(*arguments, **named) -> Staging:
        made.append(Staging(*arguments, in_pieces=True, **named))
        return made[-1]

    monkeypatch.setattr(transfers, "Staging", build)
    for module in (readers, staging):
        monkeypatch.setattr(module, "READ_PIECE_BYTES", 3 * 4096)  # cuts tensors of one tile
    with single_threaded():
        yield made


@pytest.mark.parametrize(("tiers", "write_back", "by_leaf"), every_pair(MIXES, [1, 3], [False, True]))
def test_every_visit_shows_what_the_journal_leads_to(
    tmp_path: Path, in_pieces: list[Staging], tiers: tuple[TierName, ...], write_back: int, by_leaf: bool
) -> None:
    setup = Setup(layout=small_layout(by_leaf=by_leaf), tiers=tiers, write_back=write_back)
    player = Player(setup, tmp_path / "store", fs=QuickFS())
    player.play(LIFE)  # each visit is compared with the oracle's weights
    player.close()
    is_uneven = by_leaf or {"cpu", "disk"} <= set(tiers)
    assert any(stage._ahead.qsize() for stage in in_pieces) == is_uneven


@pytest.mark.parametrize("call", ["read_some", "write_some"])
def test_an_error_of_the_drive_is_told_and_the_store_goes_on_with_sound_weights(tmp_path: Path, call: str) -> None:
    setup = Setup(tiers=("gpu", "disk", "cpu", "disk"), write_back=2)
    for nth in range(1, 12):
        fs = QuickFaultyFS()
        player = Player(setup, tmp_path / f"{nth}", fs=fs)
        player.play(steps(1, 3))
        player.store.weights_changed()
        fs.only(call, nth)
        try:
            player.play([*steps(4, 8), Action("settle")])
        except StoreError as error:
            assert "errno 5" in str(error)
        fs.only(call, 0)
        player.close()
        with setup.opened(tmp_path / f"{nth}", mode="continue", fs=QuickFS()) as store:
            store.flush()


def test_all_staging_memory_is_back_at_the_end_of_a_traversal(tmp_path: Path, in_pieces: list[Staging]) -> None:
    setup = Setup(tiers=("gpu", "disk", "cpu", "disk"), write_back=2)
    player = Player(setup, tmp_path / "store", fs=QuickFS())
    n_pieces = partial(lambda stage: (stage._free.qsize(), stage._ahead.qsize()), in_pieces[-1])
    at_first = n_pieces()
    player.play(steps(1, 20))
    player.store.weights_changed()  # forgets what was fetched and read ahead
    player.close()
    assert n_pieces() == at_first
