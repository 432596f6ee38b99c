"""Which rank does what, against Megatron-Core's own arithmetic where it is installed."""

from __future__ import annotations

import pytest

from miles.config.layout import ParallelLayout

LAYOUTS = [
    ParallelLayout(1),
    ParallelLayout(6),
    ParallelLayout(8, tensor=2, pipeline=2),
    ParallelLayout(16, tensor=2, context=2, pipeline=2),
    ParallelLayout(8, tensor=2, pipeline=2, expert=2, expert_tensor=1),
    ParallelLayout(16, tensor=2, context=2, pipeline=2, expert=2),
    ParallelLayout(12, tensor=3, expert=2, expert_tensor=2),
]


def test_example() -> None:
    layout = ParallelLayout(world_size=8, tensor=2, pipeline=2)
    assert layout.dp_size == 2 and layout.model_size == 4
    assert (layout.tp_rank(6), layout.dp_rank(6), layout.pp_rank(6)) == (0, 1, 1)
    assert [rank for rank in range(8) if layout.reports(rank)] == [4, 6]
    assert layout.is_first_stage(3) and not layout.is_last_stage(3)


def test_without_flags_every_process_takes_a_share() -> None:
    layout = ParallelLayout(3)
    assert layout.dp_size == 3 and [layout.dp_rank(r) for r in range(3)] == [0, 1, 2]
    assert all(layout.reports(r) and layout.is_first_stage(r) and layout.is_last_stage(r) for r in range(3))


def test_experts_share_the_data_parallel_processes() -> None:
    layout = ParallelLayout(8, tensor=2, expert=4, expert_tensor=1)
    assert (layout.dp_size, layout.expert_dp_size, layout.unit) == (4, 2, 4)
    assert [layout.ep_rank(r) for r in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert ParallelLayout(8, tensor=2, expert=4).unit == 8  # unset, each expert is divided like the other matrices


def test_a_world_that_the_sizes_do_not_divide() -> None:
    with pytest.raises(AssertionError):
        ParallelLayout(6, tensor=4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_are_those_of_megatron(layout: ParallelLayout) -> None:
    state = pytest.importorskip("megatron.core.parallel_state")
    ranks = range(layout.world_size)
    dense = state.RankGenerator(
        tp=layout.tensor, ep=1, dp=layout.dp_size, pp=layout.pipeline, cp=layout.context, order="tp-cp-ep-dp-pp"
    )
    places = {"tp": layout.tp_rank, "cp": layout.cp_rank, "dp": layout.dp_rank, "pp": layout.pp_rank}
    for axis, place in places.items():
        for group in dense.get_ranks(axis):
            assert [place(rank) for rank in group] == list(range(len(group))), axis
    expert = state.RankGenerator(
        tp=layout.etp_size, ep=layout.expert, dp=layout.expert_dp_size, pp=layout.pipeline, cp=1, order="tp-cp-ep-dp-pp"
    )
    places = {"tp": layout.etp_rank, "ep": layout.ep_rank, "dp": layout.expert_dp_rank, "pp": layout.pp_rank}
    for axis, place in places.items():
        for group in expert.get_ranks(axis):
            assert [place(rank) for rank in group] == list(range(len(group))), axis
    assert sum(layout.reports(rank) for rank in ranks) == layout.dp_size
