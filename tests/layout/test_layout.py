"""Promises of the layout: every parameter in exactly one place, that place the same at any granularity."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.support.toys import Block, Toy, toy
from zo2trl.layout.layout import Layout
from zo2trl.layout.model_layout import find_stacks, plan_layout
from zo2trl.zo.tiles import TILE


class Bag(GradientCheckpointingLayer):
    """A block of leaves that each own parameters of the given shapes, dtypes and trainability."""

    def __init__(self, tensors):
        super().__init__()
        for i, (shape, dtype, trainable) in enumerate(tensors):
            leaf = nn.Module()
            leaf.w = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=trainable)
            self.add_module(f"leaf{i}", leaf)


tensors = st.tuples(
    st.lists(st.integers(1, 90), min_size=0, max_size=2),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
bags = st.lists(st.lists(tensors, min_size=1, max_size=5), min_size=1, max_size=4)


def names_in_units(layout: Layout) -> Counter:
    return Counter(tensor.name for unit in layout.units for tensor in unit.tensors)


def unit_names(layout: Layout) -> dict[str, list[str]]:
    return {unit.name: [tensor.name for tensor in unit.tensors] for unit in layout.units}


def check(model: nn.Module, layout: Layout) -> None:
    """What holds for every layout of every model."""
    assert names_in_units(layout) == Counter({name: 1 for name, _ in model.named_parameters()})
    ids = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for unit in layout.units:
        offset = 0
        for tensor in unit.tensors:
            assert tensor.byte_offset == offset, "tensors follow each other"
            assert tensor.n_padded_bytes % (TILE * tensor.dtype.itemsize) == 0, "each starts on a tile"
            assert tensor.tensor_id == ids[tensor.name]
            offset += tensor.n_padded_bytes
        assert offset == unit.n_bytes
        assert [t.tensor_id for t in unit.tensors] == sorted(t.tensor_id for t in unit.tensors)
        covered = sorted((s.byte_start, s.n_bytes) for s in layout.segments if s.unit is unit)
        assert sum(n for _, n in covered) == unit.n_bytes, "segments cover the unit"
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(covered)), "and do not overlap"


def check_spans(layout: Layout) -> None:
    """Spans are exactly the trainable tensors, each with its own dtype and decay flag."""
    for segment in layout.segments:
        in_spans = [
            (int(tensor_id), span.dtype, span.decays)
            for span in segment.spans
            for tensor_id in dict.fromkeys(span.tiles.tensor_ids.tolist())
        ]
        assert in_spans == [(t.tensor_id, t.dtype, t.decays) for t in segment.tensors if t.trainable]
        for span in segment.spans:
            first = next(t for t in segment.tensors if t.tensor_id == int(span.tiles.tensor_ids[0]))
            assert span.byte_start == first.byte_offset - segment.byte_start


@settings(max_examples=60, deadline=None)
@given(blocks=bags, by_leaf=st.booleans())
def test_every_parameter_is_in_exactly_one_unit_on_a_tile_of_its_own(blocks, by_leaf):
    model = nn.Module()
    model.layers = nn.ModuleList(Bag(block) for block in blocks)
    model.head = nn.Linear(5, 7)
    names = {name for i, (name, _) in enumerate(model.named_parameters()) if i % 2}
    layout = plan_layout(model, leaf_blocks="all" if by_leaf else (), decay_names=names)
    check(model, layout)
    check_spans(layout)
    assert {t.name for unit in layout.units for t in unit.tensors if t.decays} == names


@settings(max_examples=30, deadline=None)
@given(blocks=bags)
def test_granularity_moves_no_tensor_and_leaves_the_digest_alone(blocks):
    model = nn.Module()
    model.layers = nn.ModuleList(Bag(block) for block in blocks)
    whole, some, all_leaves = (plan_layout(model, leaf_blocks=b) for b in [(), {"layers.0"}, "all"])
    assert whole.units == some.units == all_leaves.units
    assert whole.digest() == some.digest() == all_leaves.digest()


def test_the_digest_changes_with_trainability_shape_dtype_and_name_but_not_with_decay():
    def digest(change=lambda model: None, **choices):
        model = toy()
        change(model)
        return plan_layout(model, **choices).digest()

    def rename(model):
        model.top = model.norm
        del model.norm

    digests = [
        digest(),
        digest(lambda model: model.layers[0].up.weight.requires_grad_(False)),
        digest(lambda model: setattr(model, "norm", nn.LayerNorm(7))),
        digest(lambda model: model.to(torch.bfloat16)),
        digest(rename),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == digest(decay_names=["head.weight"]) == digests[0]


def test_a_tied_head_is_one_tensor_in_the_rest():
    layout = plan_layout(toy(tied=True))
    assert unit_names(layout)["root"] == ["embed.weight", "norm.weight", "norm.bias"]


def test_what_two_blocks_share_lives_in_a_shared_unit_that_never_leaves_the_device():
    model = toy()
    model.layers[2].up.weight = model.layers[0].up.weight
    for leaf_blocks in [(), "all"]:
        layout = plan_layout(model, leaf_blocks=leaf_blocks)
        check(model, layout)
        shared = next(unit for unit in layout.units if unit.kind == "shared")
        assert [t.name for t in shared.tensors] == ["layers.0.up.weight"] and shared.is_resident
        users = [p.module_name for p in layout.points if any(s.unit is shared for s in p.segments)]
        suffix = ".up" if leaf_blocks else ""
        assert users == ["root", f"layers.0{suffix}", f"layers.2{suffix}"]


def test_a_block_weight_that_is_also_used_outside_is_shared():
    model = toy()
    model.head.weight = model.embed.weight = nn.Parameter(torch.zeros(96, 48))
    model.layers[1].up.weight = model.head.weight
    layout = plan_layout(model)
    check(model, layout)
    assert unit_names(layout)["shared"] == ["embed.weight"]


@pytest.mark.parametrize("by_leaf", [False, True])
def test_two_leaves_of_one_block_that_share_a_weight_do_not_overlap(by_leaf):
    class TiedInside(Block):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(48, 96, bias=False)
            self.again.weight = self.up.weight

    model = Toy([TiedInside(), TiedInside()])
    check(model, plan_layout(model, leaf_blocks="all" if by_leaf else ()))


def test_small_trainable_parts_of_frozen_blocks_stay_on_the_device():
    model = toy().requires_grad_(False)
    for layer in model.layers:
        layer.norm.requires_grad_(True)
    for leaf_blocks in [(), "all"]:
        layout = plan_layout(model, leaf_blocks=leaf_blocks)
        check(model, layout)
        kinds = {unit.name: unit.kind for unit in layout.units}
        assert kinds["layers.0"] == "block" and kinds["layers.0 (trainable)"] == "adapter"
        assert unit_names(layout)["layers.0 (trainable)"] == ["layers.0.norm.weight", "layers.0.norm.bias"]
        streamed = [s for s in layout.segments if not s.unit.is_resident]
        assert not any(segment.is_trainable for segment in streamed), "the frozen remainder is never written"


def test_both_parts_of_a_block_that_is_mostly_trainable_are_streamed():
    model = toy()
    for layer in model.layers:
        layer.norm.requires_grad_(False)
    assert {unit.kind for unit in plan_layout(model).units} == {"root", "block"}


@pytest.mark.parametrize("part", ["norm", "up", "embed", "layers.1", "bias", "layers.2.up.weight"])
def test_what_is_frozen_never_shares_a_unit_with_what_is_trained(part):
    model = toy()
    model.layers[2].up.weight = model.layers[0].up.weight  # a shared unit
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part not in name)
    for leaf_blocks in [(), "all"]:
        layout = plan_layout(model, leaf_blocks=leaf_blocks)
        check(model, layout)
        assert all(len({tensor.trainable for tensor in unit.tensors}) == 1 for unit in layout.units)


def test_parameters_keep_their_numbers_when_a_parametrisation_moves_them_in_their_module():
    model = toy()
    order = [name for name, _ in model.named_parameters()]
    digest = plan_layout(model).digest()
    norm = model.layers[0].norm
    weight = norm._parameters.pop("weight")
    norm.register_parameter("weight", weight)
    assert plan_layout(model).digest() != digest == plan_layout(model, order=order).digest()


def test_a_fully_frozen_model_has_nothing_to_train():
    layout = plan_layout(toy().requires_grad_(False))
    assert layout.trainable_tensors() == [] and not any(segment.is_trainable for segment in layout.segments)


def test_trainable_tensors_come_in_named_parameters_order():
    model = toy()
    model.layers[0].up.weight.requires_grad_(False)
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [tensor.name for tensor in plan_layout(model).trainable_tensors()] == expected


def test_the_store_can_be_told_to_keep_another_dtype():
    layout = plan_layout(toy(), dtypes={"layers.0.up.weight": torch.bfloat16})
    dtypes = {t.name: t.dtype for unit in layout.units for t in unit.tensors}
    assert dtypes["layers.0.up.weight"] == torch.bfloat16 and dtypes["layers.1.up.weight"] == torch.float32


def test_stacks_are_found_in_real_models():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=20))
    opt = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=20, word_embed_proj_dim=16))
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, vocab_size=20))
    assert [name for name, _ in find_stacks(llama)] == ["model.layers"]
    assert [name for name, _ in find_stacks(opt)] == ["model.decoder.layers"]
    assert [name for name, _ in find_stacks(t5)] == ["encoder.block", "decoder.block"]
    for model in (llama, opt, t5):
        for leaf_blocks in [(), "all"]:
            check(model, plan_layout(model, leaf_blocks=leaf_blocks))
    assert plan_layout(t5).stack_ends == {"encoder.block.1", "decoder.block.1"}


def test_a_list_of_experts_inside_a_block_is_no_stack():
    class Experts(Block):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([Block(), Block()])

    assert [name for name, _ in find_stacks(Toy([Experts(), Experts()]))] == ["layers"]


def test_models_of_plain_modules_are_cut_where_they_say_they_must_not_be():
    class Layer(nn.Linear):
        pass

    model = nn.Module()
    model.stack = nn.ModuleList([Layer(3, 3), Layer(3, 3)])
    model.other = nn.ModuleList([nn.Linear(3, 3)])
    assert find_stacks(model) == []
    model._no_split_modules = ["Layer"]
    assert [name for name, _ in find_stacks(model)] == ["stack"]


def test_a_model_without_blocks_is_all_rest():
    layout = plan_layout(nn.Linear(3, 4))
    assert unit_names(layout) == {"root": ["weight", "bias"]} and len(layout.points) == 1


def test_rest_comes_first_and_is_there_even_when_it_is_empty():
    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    layout = plan_layout(model)
    assert layout.points[0] is layout.root and layout.root.segments == ()
