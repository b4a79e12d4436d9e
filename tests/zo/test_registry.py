"""Promises of the registry: a method is named by one string, and made again from it."""

import itertools

import pytest

from zo2trl.zo.method import METHODS, DrawnOtherwise, Method, UnknownPart, differing_part, make_method, method_of
from zo2trl.zo.noise import DIRECTIONS

ALL = [
    Method(direction=direction, estimator=estimator, update=update)
    for direction, estimator, update in itertools.product(*METHODS)
]


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.identity)
def test_a_method_is_made_again_from_its_identity(method: Method) -> None:
    again = method_of(method.identity)
    assert again.identity == method.identity
    assert (type(again.direction), again.estimator, again.update) == (
        type(method.direction), method.estimator, method.update,
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_a_user_chooses_can_be_made_again_from_a_journal(direction: str, rounding: str) -> None:
    method = make_method(direction, rounding=rounding, zo_eps=0.5, num_directions=3, tensors=[(0, 7)])
    assert method_of(method.identity, tensors=[(0, 7)]).identity == method.identity
    assert "0.5" not in method.identity, "what may change within a run is not part of the identity"


@pytest.mark.parametrize("part", range(3))
def test_an_unknown_part_is_refused(part: int) -> None:
    names = ALL[0].identity.split(" | ")
    names[part] = "later-1"
    with pytest.raises(UnknownPart, match="later-1"):
        method_of(" | ".join(names))


@pytest.mark.parametrize("identity", ["", "None", "a | b", f"{ALL[0].identity} | more"])
def test_what_names_no_method_is_refused(identity: str) -> None:
    with pytest.raises(UnknownPart):
        method_of(identity)


def test_a_direction_of_another_kind_of_device_is_refused_by_both_names() -> None:
    recorded = make_method("mezo", rounding="nearest", device_kind="cuda/132x2048").identity
    with pytest.raises(DrawnOtherwise) as refused:
        method_of(recorded)
    assert (refused.value.name, refused.value.here) == (
        "mezo/torch-normal-1/cuda/132x2048", "mezo/torch-normal-1/cpu",
    )  # fmt: skip


def test_a_difference_is_named_with_the_argument_that_chooses_it() -> None:
    one, other = make_method("rademacher", rounding="nearest"), make_method("rademacher", rounding="stochastic")
    assert differing_part(one.identity, one.identity) is None
    assert "`rounding`" in (differing_part(one.identity, other.identity) or "")
    other = make_method("gaussian", rounding="nearest")
    assert "`direction`" in (differing_part(one.identity, other.identity) or "")
