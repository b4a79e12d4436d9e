"""Promises about stand-ins: every operation gives what it gives for the real tensor; only the memory is not taken."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from zo2trl.engine import deferred
from zo2trl.engine.deferred import Deferral, DeferredRows, defer
from zo2trl.errors import TraversalError

ROWS, WIDTH, CLASSES = 13, 8, 24
SHAPES = [(ROWS, WIDTH), (1, ROWS, WIDTH), (ROWS, 1, WIDTH), (2, 3, WIDTH)]
ROWWISE = {
    "float": lambda x: x.float(),
    "to a dtype": lambda x: x.to(torch.float64),
    "to its device": lambda x: x.to(x.device),
    "contiguous": lambda x: x.contiguous(),
    "times": lambda x: x * 0.3,
    "number first": lambda x: 3 * x,
    "torch.mul": lambda x: torch.mul(x, 2),
    "over": lambda x: x / 30.0,
    "tanh": torch.tanh,
    "method tanh": lambda x: x.tanh(),
    "flat": lambda x: x.view(-1, x.size(-1)),
    "reshape": lambda x: x.reshape(1, -1, x.shape[-1]),
    "flatten": lambda x: x.flatten(0, -2),
}
REAL = {
    "softmax": lambda x: x.softmax(-1),
    "greatest": lambda x: x.argmax(-1),
    "sum": lambda x: x.sum(),
    "one position": lambda x: x[..., -1, :],
    "transposed": lambda x: x.transpose(0, 1),
    "a view that cuts rows": lambda x: x.view(-1),
    "plus another": lambda x: x + torch.ones(CLASSES),
    "times a tensor": lambda x: x * torch.arange(CLASSES),
    "times itself": lambda x: x * x,
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "list": lambda x: torch.tensor(x.tolist()),
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
    "copy": copy.deepcopy,
    "clone": torch.clone,
    "together with others": lambda x: torch.cat([torch.zeros(1, *x.shape[1:]), x]),
    "named argument": lambda x: torch.mul(input=x, other=2.0),
    "smoothed loss": lambda x: F.cross_entropy(x.flatten(0, -2), targets(x), label_smoothing=0.1),
    "weighted loss": lambda x: F.cross_entropy(x.flatten(0, -2), targets(x), torch.arange(CLASSES) * 1.0),
    "loss of probabilities": lambda x: F.cross_entropy(x.flatten(0, -2), x.flatten(0, -2).detach().softmax(-1)),
    "without torch functions": lambda x: _without_functions(x),
    "saved": lambda x: _saved(x),
}


def _without_functions(x):
    with torch._C.DisableTorchFunctionSubclass():
        return torch.relu(x)


def _saved(x):
    torch.save(x, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def targets(x, *, ignored=None):
    target = torch.randint(CLASSES, x.shape[:-1], generator=torch.Generator().manual_seed(3)).flatten()
    if ignored is not None:
        target[::3] = ignored
    return target


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(deferred, "CHUNK_ROWS", 4)


@pytest.fixture(autouse=True)
def without_grad():
    with torch.no_grad():
        yield


def projected(*shape, dtype=torch.float32, bias=True, deferral=None):
    """(stand-in, real): logits of some hidden states."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape or (2, 3, WIDTH), generator=generator).to(dtype)
    weight = torch.randn(CLASSES, WIDTH, generator=generator).to(dtype)
    offset = torch.randn(CLASSES, generator=generator).to(dtype) if bias else None
    stand_in = defer(hidden, deferral or Deferral())
    assert stand_in is not None
    return F.linear(stand_in, weight, offset), F.linear(hidden, weight, offset)


def is_put_off(x):
    return isinstance(x, DeferredRows) and x.node.real is None


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ROWWISE)
def test_what_acts_on_rows_alone_is_put_off_and_gives_the_same(name, shape):
    x, real = projected(*shape)
    result = ROWWISE[name](x)
    assert is_put_off(result) and is_put_off(x)
    expected = ROWWISE[name](real)
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(result.node.settle(), expected)


@pytest.mark.parametrize("name", REAL)
def test_everything_else_gets_the_real_tensor(name):
    x, real = projected()
    result = REAL[name](x)
    assert not is_put_off(result) and not is_put_off(x)
    assert torch.equal(result, REAL[name](real))


@given(
    names=st.lists(st.sampled_from(sorted(ROWWISE)), max_size=5),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.sampled_from([None, -100, 7]),
)
def test_a_loss_after_any_of_it_is_the_same_number(names, shape, dtype, reduction, ignored):
    x, real = projected(*shape, dtype=dtype)
    for name in names:
        x, real = ROWWISE[name](x), ROWWISE[name](real)
    x, real = ROWWISE["flat"](x), ROWWISE["flat"](real)
    options = {"reduction": reduction} | ({} if ignored is None else {"ignore_index": ignored})
    target = targets(real, ignored=ignored)
    expected = F.cross_entropy(real, target, **options)
    loss = F.cross_entropy(x, target, **options)
    assert is_put_off(x)
    assert (type(loss), loss.dtype, loss.shape) == (torch.Tensor, expected.dtype, expected.shape)
    torch.testing.assert_close(loss, expected, rtol=1e-2 if expected.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n_rows", [1, 4, 1000])
def test_given_the_same_logits_the_loss_has_the_same_bits_whatever_the_chunk(n_rows, reduction, monkeypatch):
    """A diagonal projection: the matrix multiplication cannot depend on the number of rows."""
    hidden = torch.randn(n_rows, CLASSES, generator=torch.Generator().manual_seed(1))
    target = targets(hidden, ignored=-100)
    expected = F.cross_entropy(hidden, target, reduction=reduction)
    for chunk in (1, 3, 256, 5000):
        monkeypatch.setattr(deferred, "CHUNK_ROWS", chunk)
        logits = F.linear(defer(hidden, Deferral()), torch.eye(CLASSES))
        loss = F.cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)


def test_no_operation_of_a_loss_makes_more_than_one_chunk_of_logits():
    x, real = projected(50, WIDTH)
    target = targets(real)
    with Largest() as whole:
        F.cross_entropy(real.float() * 0.5, target)
    with Largest() as chunked:
        F.cross_entropy(x.float() * 0.5, target)
    assert whole.numel == 50 * CLASSES
    assert chunked.numel == max(4 * CLASSES, 50 * WIDTH)


def test_a_loss_without_any_label_is_what_it_is_for_real_logits():
    x, real = projected(ROWS, WIDTH)
    nothing = torch.full((ROWS,), -100)
    assert F.cross_entropy(x, nothing).isnan() and F.cross_entropy(real, nothing).isnan()
    assert F.cross_entropy(x, nothing, reduction="sum").item() == 0.0


def test_a_label_out_of_range_is_refused_as_for_real_logits():
    x, real = projected(ROWS, WIDTH)
    target = torch.full((ROWS,), CLASSES)
    with pytest.raises(IndexError) as expected:
        F.cross_entropy(real, target)
    with pytest.raises(IndexError, match=str(expected.value)[:20]):
        F.cross_entropy(x, target)


def test_a_view_that_cannot_be_fails_as_it_does_for_the_real_tensor():
    x, real = projected(ROWS, WIDTH)
    with pytest.raises(RuntimeError) as expected:
        real.view(-1, 7)
    with pytest.raises(RuntimeError, match="shape") as error:
        x.view(-1, 7)
    assert str(error.value) == str(expected.value)


# ------------------------------------------------------------------------------------------------- writing in place


def test_a_widened_copy_does_not_see_what_is_written_into_the_original():
    x, real = projected(dtype=torch.bfloat16)
    copied = x.float()
    x.mul_(2)
    assert torch.equal(copied.node.settle(), real.float())
    assert torch.equal(x.node.settle(), real * 2)


def test_a_view_sees_what_is_written_into_the_original_and_the_other_way_round():
    x, real = projected()
    flat = x.flatten(0, -2)
    x.mul_(2)
    assert torch.equal(flat.clone(), real.flatten(0, -2) * 2)
    flat.zero_()
    assert not x.any()


def test_hidden_states_that_were_changed_in_place_are_not_taken_for_the_old_ones():
    hidden = torch.ones(3, WIDTH)
    x = F.linear(defer(hidden, Deferral()), torch.ones(CLASSES, WIDTH))
    hidden.add_(1)
    with pytest.raises(TraversalError, match="changed in place"):
        x.sum()
    with pytest.raises(TraversalError, match="changed in place"):
        F.cross_entropy(x, torch.zeros(3, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------- lifetime


def test_what_is_still_held_at_the_end_becomes_real_and_stays_so():
    deferral = Deferral()
    x, real = projected(deferral=deferral)
    scaled = x * 2
    deferral.settle()
    deferral.is_over = True
    assert torch.equal(x.clone(), real) and torch.equal(scaled.clone(), real * 2)
    assert type(x + 1) is torch.Tensor


def test_what_nobody_holds_is_never_made():
    deferral = Deferral()
    x, _ = projected(50, WIDTH, deferral=deferral)
    F.cross_entropy(x.float(), targets(x))
    del x
    with Largest() as made:
        deferral.settle()
    assert made.numel == 0


def test_what_was_never_made_is_refused_afterwards():
    deferral = Deferral()
    x, _ = projected(deferral=deferral)
    deferral.is_over = True
    with pytest.raises(TraversalError, match="never made"):
        x.sum()


def test_real_logits_are_made_once():
    x, _ = projected()
    kept = x.float() * 2
    kept.sum()
    with Largest() as again:
        assert kept.node.settle() is kept.node.settle()
        assert x.node.settle() is x.node.settle()
    assert again.numel == 0


# ------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("later", [False, True], ids=["inside", "after it has ended"])
def test_a_projection_asked_for_under_autocast_is_done_under_autocast(later):
    hidden, weight, bias = torch.randn(50, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES)
    target = targets(hidden)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        real = F.linear(hidden, weight, bias)
        x = F.linear(defer(hidden, Deferral()), weight, bias)
        kept = F.linear(defer(hidden, Deferral()), weight, bias)
        loss = F.cross_entropy(x.float(), target)
        expected = F.cross_entropy(real.float(), target)
        if not later:
            assert torch.equal(kept.clone(), real)
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(F.cross_entropy(x.float(), target) if later else loss, expected, rtol=1e-6, atol=0)
    assert torch.equal(kept.clone(), real)


def test_a_projection_asked_for_without_autocast_is_done_without():
    x, real = projected(50, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(x.clone(), real)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(3), torch.zeros(0, WIDTH), torch.nn.Parameter(torch.zeros(3, WIDTH)), None],
    ids=["one row", "no row", "a parameter", "no tensor"],
)
def test_what_cannot_be_put_off_is_left_alone(rows):
    assert defer(rows, Deferral()) is None


def test_tensors_of_inference_mode_are_left_alone():
    with torch.inference_mode():
        assert defer(torch.zeros(3, WIDTH), Deferral()) is None
