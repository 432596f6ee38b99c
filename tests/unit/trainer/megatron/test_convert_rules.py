"""Rules of Megatron parameters beside tensors that are joined and cut by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from miles.trainer.megatron.convert.families import FAMILIES
from miles.trainer.megatron.convert.layout import plainly
from miles.trainer.megatron.convert.rules import Parameter, Place, Rule, Sizes

HEADS, GROUPS, HEAD, HIDDEN, FFN, EXPERT_FFN, VOCAB, PADDED, EXPERTS = 8, 2, 3, 5, 8, 4, 13, 16, 4
SIZES = Sizes(
    {
        "hidden": HIDDEN, "query": HEADS * HEAD, "key": GROUPS * HEAD, "head": HEAD, "ffn": FFN, "vocab": VOCAB,
        "experts": EXPERTS, "expert_ffn": EXPERT_FFN,
    },
    GROUPS,
    PADDED,
)  # fmt: skip
RULES = {rule.megatron: rule for family in FAMILIES.values() for rule in family.rules}


def parameter_of(ending: str) -> Parameter:
    (rule,) = [rule for name, rule in RULES.items() if name.endswith(ending)]
    return Parameter(rule, SIZES, stage=0, local="0.x", layer=2, expert=3 if rule.per_expert else None)


def tensors_of(parameter: Parameter) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for _, shape in parameter.parts]


def rebuilt(parameter: Parameter, rank: int, size: int) -> Tensor:
    """What loading makes of the rule."""
    local, axis = torch.zeros(parameter.shape(size)), parameter.axis
    for s in parameter.segments(rank, size):
        part = tensors_of(parameter)[s.part].narrow(axis, s.whole, s.length)
        local.narrow(axis, s.local, s.length).copy_(part)
    return local


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_query_groups_are_interleaved_and_cut_evenly(kind: str, size: int) -> None:
    parameter = parameter_of(f"linear_qkv.{kind}")
    q, k, v = (t.unflatten(0, (GROUPS, -1)) for t in tensors_of(parameter))
    whole = torch.cat([torch.cat([q[g], k[g], v[g]]) for g in range(GROUPS)])
    if len(whole) % size == 0:
        for rank, shard in enumerate(whole.chunk(size)):
            assert torch.equal(rebuilt(parameter, rank, size), shard)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("ending", [".mlp.linear_fc1.weight", "}.linear_fc1.weight"])
def test_every_rank_has_its_gates_above_its_ups(ending: str, size: int) -> None:
    parameter = parameter_of(ending)
    gates, ups = (t.chunk(size) for t in tensors_of(parameter))
    for rank in range(size):
        assert torch.equal(rebuilt(parameter, rank, size), torch.cat([gates[rank], ups[rank]]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_columns_of_down_projections_are_cut(size: int) -> None:
    parameter = parameter_of(".mlp.linear_fc2.weight")
    (whole,) = tensors_of(parameter)
    for rank, shard in enumerate(whole.chunk(size, 1)):
        assert torch.equal(rebuilt(parameter, rank, size), shard)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_vocabulary_is_padded_at_its_end(size: int) -> None:
    parameter = parameter_of("word_embeddings.weight")
    (whole,) = tensors_of(parameter)
    padded = torch.cat([whole, torch.zeros(PADDED - VOCAB, HIDDEN)])
    for rank, shard in enumerate(padded.chunk(size)):
        assert torch.equal(rebuilt(parameter, rank, size), shard)


def test_a_rank_may_hold_padding_only() -> None:
    assert parameter_of("word_embeddings.weight").segments(7, 8) == []


@pytest.mark.parametrize("ending", ["router.weight", "q_layernorm.weight", "final_layernorm.weight"])
def test_what_is_not_cut_is_everywhere(ending: str) -> None:
    parameter = parameter_of(ending)
    assert all(torch.equal(rebuilt(parameter, rank, 4), tensors_of(parameter)[0]) for rank in range(4))


def test_places_of_an_expert() -> None:
    parameter = parameter_of("}.linear_fc1.weight")
    stack, shape = "model.layers.2.mlp.experts.gate_up_proj", (EXPERTS, 2 * EXPERT_FFN, HIDDEN)
    assert parameter.places(stacked=True) == [
        Place(stack, shape, EXPERT_FFN, index=3, row=0),
        Place(stack, shape, EXPERT_FFN, index=3, row=EXPERT_FFN),
    ]
    assert [place.tensor for place in parameter.places(stacked=False)] == [
        "model.layers.2.mlp.experts.3.gate_proj.weight",
        "model.layers.2.mlp.experts.3.up_proj.weight",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_names_everything_once(family: str) -> None:
    rules: tuple[Rule, ...] = FAMILIES[family].rules
    ours = [rule.megatron for rule in rules]
    theirs = [name for rule in rules for name in rule.hugging_face]
    assert len(ours) == len(set(ours)) and len(theirs) == len(set(theirs))


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        ("1.decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "1.decoder.layers.3.input_layernorm.weight"),
        ("0.decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "0.decoder.layers.0.pre_mlp_layernorm.weight"),
        (
            "0.decoder.layers.0.mlp.experts.linear_fc2.weight17",
            "0.decoder.layers.0.mlp.experts.local_experts.17.linear_fc2.weight",
        ),
        ("0.decoder.layers.0.mlp.linear_fc1.weight", "0.decoder.layers.0.mlp.linear_fc1.weight"),
    ],
)
def test_spellings(spelled: str, plain: str) -> None:
    assert plainly(spelled) == plain
