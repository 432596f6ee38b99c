"""The published formulas of the training side: context-parallel helpers, policy-optimization utilities, losses."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from miles.backends.training_utils import cp_utils
from miles.backends.training_utils import loss as losses
from miles.backends.training_utils.parallel import ParallelState
from miles.loss.types import LossSettings
from miles.utils import distributed_utils, ppo_utils

ALONE = ParallelState()
TWO = ParallelState(cp_size=2)


# ---- cp_utils --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "response"), [(5, 3), (6, 1), (7, 6), (4, 0), (2, 1)])
def test_offsets_cover_every_response_token_once(total: int, response: int) -> None:
    size, chunks, logits, tokens = cp_utils.get_logits_and_tokens_offset_with_cp(total, response, ALONE)
    assert chunks == ((0, size), (size, 2 * size)) and 2 * size >= total
    places = [place for start, end in tokens for place in range(start, end)]
    assert places == list(range(total - response, total))
    for (start, end), (first, last), chunk in zip(logits, tokens, chunks):
        assert last - first == end - start
        assert start == end == 0 or (first == start + 1 and chunk[0] <= start < end <= chunk[1])


def test_offsets_of_the_docstring() -> None:
    got = cp_utils.get_logits_and_tokens_offset_with_cp(5, 3, ALONE)
    assert got == (3, ((0, 3), (3, 6)), ((1, 3), (3, 4)), ((2, 4), (4, 5)))


def test_one_rank_has_everything() -> None:
    column = torch.arange(3.0)
    assert cp_utils.all_gather_with_cp(column, 5, 3, ALONE) is column
    assert cp_utils.slice_log_prob_with_cp([0.1, 0.2], 5, 2, ALONE) == [0.1, 0.2]
    tokens = torch.arange(4)
    assert cp_utils.slice_with_cp(tokens, 0, ALONE) is tokens
    assert cp_utils.slice_with_cp(tokens, 9, ALONE, "bshd", 6).tolist() == [0, 1, 2, 3, 9, 9]
    rows = torch.ones(2, 3)
    assert cp_utils.slice_with_cp(rows, 0.0, ALONE, "bshd", 3).tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]

    def pad(x: torch.Tensor, missing: int) -> torch.Tensor:
        return torch.cat([x, -torch.arange(missing)])

    assert cp_utils.slice_with_cp(tokens, pad, ALONE, "bshd", 6).tolist() == [0, 1, 2, 3, 0, -1]


def test_wrong_lengths_are_told() -> None:
    with pytest.raises(ValueError, match="2 values for a response of 3 tokens"):
        cp_utils.all_gather_with_cp(torch.zeros(2), 5, 3, ALONE)
    with pytest.raises(ValueError, match="1 values for a response of 3 tokens"):
        cp_utils.slice_log_prob_with_cp([0.0], 5, 3, ALONE)
    with pytest.raises(ValueError, match="needs max_seq_len"):
        cp_utils.slice_with_cp(torch.zeros(2), 0, ALONE, "bshd")


@pytest.mark.parametrize(("total", "response"), [(10, 4), (5, 3), (3, 1), (4, 0), (17, 16)])
@pytest.mark.parametrize("layout", [("thd", None), ("bshd", 19)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_parts_of_all_ranks(total: int, response: int, layout: tuple[str, int | None], size: int) -> None:
    """Each token is in one rank's chunks, each response token in one rank's part, which follows from the chunks."""
    column, tokens = torch.arange(float(response)), torch.arange(total)
    found, owned = [], []
    for rank in range(size):
        state = ParallelState(cp_rank=rank, cp_size=size)
        chunk, chunks, logits, scored = cp_utils.get_logits_and_tokens_offset_with_cp(total, response, state, *layout)
        assert [start for start, _ in chunks] == [rank * chunk, (2 * size - 1 - rank) * chunk]
        assert all(end - start == chunk for start, end in chunks)
        own = cp_utils.slice_log_prob_with_cp(column, total, response, state, *layout)
        assert cp_utils.slice_log_prob_with_cp(column.tolist(), total, response, state, *layout) == own.tolist()
        places = [place for start, end in scored for place in range(start, end)]
        assert own.tolist() == [place - (total - response) for place in places]
        for (start, end), (first, last), (begin, stop) in zip(logits, scored, chunks):
            assert start == end == 0 or (begin <= start < end <= stop and (first, last) == (start + 1, end + 1))
        mine = cp_utils.slice_with_cp(tokens, -1, state, *layout)
        assert len(mine) == (2 * chunk if size > 1 else (total if layout[0] == "thd" else 19))
        owned += own.tolist()
        found += [token for token in mine.tolist() if token >= 0]
    assert sorted(owned) == column.tolist() and sorted(found) == tokens.tolist()


def test_parts_of_sums_over_samples() -> None:
    """Numerators are a rank's own tokens, denominators whole samples."""
    masks, values = [torch.tensor([1, 0, 1, 1]), torch.tensor([1, 1])], torch.tensor([1.0, 9.0, 4.0, 7.0, 2.0, 6.0])
    for per_token in (False, True):
        parts = 0.0
        for rank in range(2):
            state = ParallelState(cp_rank=rank, cp_size=2)
            reduce = cp_utils.get_sum_of_sample_mean([10, 9], [4, 2], masks, state, per_token)
            rows = zip(values.split([4, 2]), [10, 9], [4, 2])
            parts += float(reduce(torch.cat([cp_utils.slice_log_prob_with_cp(*row, state) for row in rows])))
        assert parts == pytest.approx(20.0 if per_token else 4.0 + 4.0)


def test_a_size_without_a_group() -> None:
    with pytest.raises(ValueError, match="cp_size 2 without a cp_group"):
        cp_utils.all_gather_with_cp(torch.zeros(0), 10, 4, TWO)
    with pytest.raises(ValueError, match="4 values where this rank has 0 of a response of 4 tokens"):
        cp_utils.all_gather_with_cp(torch.zeros(4), 10, 4, TWO)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ppo_utils.get_advantages_and_returns(5, 1, torch.zeros(1), torch.zeros(1), 1.0, 1.0, TWO),
        lambda: ppo_utils.get_advantages_and_returns_batch([5], [1], [torch.zeros(1)], [torch.zeros(1)], 1.0, 1.0, TWO),
        lambda: ppo_utils.get_reinforce_plus_plus_returns(torch.zeros(1), [], [], [], [], 0.0, 1.0, TWO),
    ],
)
def test_more_than_one_rank_is_refused(call: Any) -> None:
    with pytest.raises(ValueError, match="2 context-parallel ranks"):
        call()


def test_sums_of_sample_means() -> None:
    masks = [torch.tensor([1, 0, 1]), torch.tensor([0, 0])]
    values = torch.tensor([1.0, 100.0, 3.0, 7.0, 7.0])
    reduce = cp_utils.get_sum_of_sample_mean([5, 4], [3, 2], masks, ALONE)
    assert reduce(values) == 2.0
    reduce = cp_utils.get_sum_of_sample_mean([5, 4], [3, 2], masks, ALONE, calculate_per_token_loss=True)
    assert reduce(values) == 4.0


# ---- ppo_utils -------------------------------------------------------------------------------------------------------


def test_log_probs_and_entropy_in_chunks() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 6, 3, 3, 1])
    expected = torch.log_softmax(logits, -1)[torch.arange(5), tokens][:, None]
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    for chunk in (-1, 2, 9):
        log_probs, got = ppo_utils.calculate_log_probs_and_entropy(logits, tokens, None, True, chunk)
        torch.testing.assert_close(log_probs, expected)
        torch.testing.assert_close(got.detach(), entropy)
    assert ppo_utils.calculate_log_probs_and_entropy(logits, tokens, None)[1] is None
    torch.testing.assert_close(ppo_utils.compute_log_probs(logits, tokens, None), expected)
    torch.testing.assert_close(ppo_utils.compute_entropy_from_logits(logits, None).detach(), entropy)
    ppo_utils.compute_log_probs(logits, tokens, None).sum().backward()
    assert logits.grad is not None and float(logits.grad.abs().sum()) > 0


def test_no_response_token_at_all() -> None:
    log_probs, entropy = ppo_utils.calculate_log_probs_and_entropy(
        torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), None, with_entropy=True
    )
    assert log_probs.shape == (0, 1) and entropy is not None and entropy.shape == (0,)


def test_sequence_ratios() -> None:
    now = [torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0, -1.0])]
    old = [torch.tensor([-0.5, -1.0]), torch.tensor([-1.5, -9.0, -1.5])]
    masks = [torch.tensor([1, 1]), torch.tensor([1, 0, 1])]
    kl = ppo_utils.compute_gspo_kl(now, old, now, masks)
    assert kl.tolist() == [0.75, 0.75, -0.5, -0.5, -0.5]
    advantages = [torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, -1.0, -1.0])]
    keep, share = ppo_utils.compute_opsm_mask(Namespace(opsm_delta=0.5), now, old, advantages, masks)
    assert keep.tolist() == [0, 1, 1, 1, 1] and share == 0.5
    keep, share = ppo_utils.compute_opsm_mask(Namespace(opsm_delta=-1.0), now, old, advantages, masks)
    assert keep.tolist() == [0, 1, 0, 0, 0] and share == 0.5 + 1.5


def test_returns_of_estimators() -> None:
    rewards = torch.tensor([1.0, -2.0])
    kl = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5])]
    assert [row.tolist() for row in ppo_utils.get_grpo_returns(rewards, kl)] == [[1.0] * 3, [-2.0]]
    masks = [torch.tensor([1, 1, 0]), torch.tensor([1])]
    got = ppo_utils.get_reinforce_plus_plus_returns(rewards, kl, masks, [3, 1], [5, 4], 0.5, 0.9, ALONE)
    third, second = -0.15, -0.1 + 1.0
    expected = [-0.05 + 0.9 * (second + 0.9 * third), second + 0.9 * third, third]
    torch.testing.assert_close(got[0], torch.tensor(expected))
    torch.testing.assert_close(got[1], torch.tensor([-2.25]))
    got = ppo_utils.get_reinforce_plus_plus_baseline_advantages(rewards, kl, masks, 0.5)
    torch.testing.assert_close(got[0], torch.tensor([0.95, 0.9, 0.85]))
    with pytest.raises(AssertionError, match="no unmasked token"):
        ppo_utils.get_reinforce_plus_plus_returns(
            rewards, kl, [masks[0], torch.tensor([0])], [3, 1], [5, 4], 0.5, 0.9, ALONE
        )


@pytest.mark.parametrize(("gamma", "lambd"), [(1.0, 1.0), (0.9, 0.95), (0.0, 0.5), (1.0, 0.0)])
def test_gae_three_ways(gamma: float, lambd: float) -> None:
    torch.manual_seed(1)
    rewards, values = torch.randn(3, 11, dtype=torch.float64), torch.randn(3, 11, dtype=torch.float64)
    expected = torch.zeros_like(rewards)
    for row in range(3):
        advantage = value = 0.0
        for t in reversed(range(11)):
            delta = float(rewards[row, t]) + gamma * value - float(values[row, t])
            advantage = delta + gamma * lambd * advantage
            value = float(values[row, t])
            expected[row, t] = advantage
    advantages, returns = ppo_utils.vanilla_gae(rewards, values, gamma, lambd)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)
    for size in (1, 4, 11, 128):
        torch.testing.assert_close(ppo_utils.chunked_gae(rewards, values, gamma, lambd, size)[0], expected)


@pytest.mark.parametrize("chunked", [True, False])
def test_gae_of_samples_of_different_lengths(chunked: bool) -> None:
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])]
    rewards = [torch.tensor([0.0, 0.0, 1.0]), torch.tensor([-1.0])]
    many = ppo_utils.get_advantages_and_returns_batch([5, 2], [3, 1], values, rewards, 0.9, 0.8, ALONE, chunked)
    for i in range(2):
        total, length = [5, 2][i], len(values[i])
        one = ppo_utils.get_advantages_and_returns(total, length, values[i], rewards[i], 0.9, 0.8, ALONE)
        torch.testing.assert_close((many[0][i], many[1][i]), one)


# ---- processes -------------------------------------------------------------------------------------------------------


def test_whitening() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, float("nan")])
    mask = torch.tensor([1, 1, 1, 0])
    got = distributed_utils.distributed_masked_whiten(values, mask)
    kept = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(got[:3], (kept - kept.mean()) / kept.std())
    same_mean = distributed_utils.distributed_masked_whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(same_mean[:3], got[:3] + 3.0)
    assert distributed_utils.distributed_masked_whiten(torch.tensor([5.0]), torch.tensor([1])).tolist() == [0.0]
    with pytest.raises(ValueError, match="no value is unmasked"):
        distributed_utils.distributed_masked_whiten(values, torch.zeros(4))


def test_groups_beside_the_default_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="call init_gloo_group"):
        distributed_utils.get_gloo_group()
    with pytest.raises(ValueError, match="either init_method or store"):
        distributed_utils.init_process_group("gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/default", rank=0, world_size=1)
    try:
        group = distributed_utils.init_gloo_group()
        assert distributed_utils.get_gloo_group() is group is distributed_utils.init_gloo_group()
        other = distributed_utils.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/other", rank=0, world_size=1, group_name="weights"
        )
        tensor = torch.tensor([3.0])
        dist.all_reduce(tensor, group=other)
        assert tensor.tolist() == [3.0] and dist.get_world_size(other) == 1
        mask = torch.ones(3)
        assert distributed_utils.distributed_masked_whiten(torch.tensor([1.0, 2.0, 3.0]), mask, group)[1] == 0
    finally:
        dist.destroy_process_group()
        distributed_utils.GLOO_GROUP = None


# ---- losses ----------------------------------------------------------------------------------------------------------


def batch_of(lengths: list[tuple[int, int]]) -> tuple[torch.Tensor, dict[str, Any]]:
    torch.manual_seed(2)
    totals, responses = [total for total, _ in lengths], [response for _, response in lengths]
    logits = torch.randn(1, sum(totals), 9, requires_grad=True)
    rows = {
        name: [torch.randn(n) * 0.1 - 2 for n in responses]
        for name in ("log_probs", "rollout_log_probs", "ref_log_probs", "advantages")
    }
    return logits, {
        "unconcat_tokens": [torch.randint(0, 9, (n,)) for n in totals],
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": [torch.ones(n, dtype=torch.int32) for n in responses],
        **rows,
    }


def settings(**given: Any) -> Namespace:
    defaults = {field.name: getattr(LossSettings(), field.name) for field in fields(LossSettings)}
    extra = {
        "rollout_temperature": 1.0, "custom_tis_function_path": None, "custom_pg_loss_reducer_function_path": None,
    }  # fmt: skip
    return Namespace(**{**defaults, **extra, **given})


def test_the_published_policy_loss_is_the_built_in_one() -> None:
    logits, batch = batch_of([(5, 3), (4, 2)])
    args = settings(entropy_coef=0.01)
    reduce = cp_utils.get_sum_of_sample_mean([5, 4], [3, 2], batch["loss_masks"], ALONE)
    loss, metrics = losses.policy_loss_function(args, ALONE, batch, logits, reduce)
    current = torch.cat(
        losses.get_log_probs_and_entropy(
            logits,
            args=args,
            parallel_state=ALONE,
            **{name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")},
        )["log_probs"]
    )
    pg, clipped = ppo_utils.compute_policy_loss(
        torch.cat(batch["log_probs"]) - current, torch.cat(batch["advantages"]), 0.2, 0.2
    )
    torch.testing.assert_close(metrics["pg_loss"], reduce(pg).detach())
    torch.testing.assert_close(metrics["pg_clipfrac"], reduce(clipped))
    torch.testing.assert_close(loss, reduce(pg) - 0.01 * metrics["entropy_loss"])
    loss.backward()
    assert logits.grad is not None and float(logits.grad.abs().sum()) > 0


def test_the_published_policy_loss_uses_the_functions_that_args_name() -> None:
    logits, batch = batch_of([(5, 3)])
    args = settings(use_tis=True, custom_tis_function_path="miles.backends.training_utils.loss.icepop_function")
    metrics = losses.policy_loss_function(args, ALONE, batch, logits, sum)[1]  # type: ignore[arg-type]
    assert {"tis", "tis_clipfrac", "tis_abs", "ois"} <= metrics.keys()


def test_the_published_sft_loss() -> None:
    logits, batch = batch_of([(5, 3), (4, 0)])
    reduce = cp_utils.get_sum_of_sample_mean([5, 4], [3, 0], batch["loss_masks"], ALONE)
    loss, metrics = losses.sft_loss_function(settings(), ALONE, batch, logits, reduce)
    ids = batch["unconcat_tokens"][0][2:]
    expected = -torch.log_softmax(logits[0, 1:4], -1)[torch.arange(3), ids].mean()
    torch.testing.assert_close(loss, expected)
    assert metrics["loss"] == loss.detach()


def test_helpers_without_parallel_state() -> None:
    """slime's plug-ins pass none; what stands at its place is the next argument, not a state."""
    masks, values = [torch.ones(3), torch.tensor([1.0, 0.0])], torch.arange(5.0)
    for per_token in (False, True):
        with_state = cp_utils.get_sum_of_sample_mean([5, 4], [3, 2], masks, ALONE, per_token)
        for without in (
            cp_utils.get_sum_of_sample_mean([5, 4], [3, 2], masks, per_token),
            cp_utils.get_sum_of_sample_mean([5, 4], [3, 2], masks, calculate_per_token_loss=per_token),
        ):
            assert without(values) == with_state(values)
    assert cp_utils.slice_log_prob_with_cp([0.5], 3, 1) == [0.5]
    assert cp_utils.slice_with_cp(torch.ones(2), 0, "bshd", 3).tolist() == [1, 1, 0]
    assert cp_utils.get_logits_and_tokens_offset_with_cp(5, 3)[0] == 3


def test_values_are_those_before_the_response_tokens() -> None:
    head = torch.arange(9.0).reshape(1, 9, 1)
    got = losses.get_values(
        head,
        args=settings(rollout_temperature=2.0),
        parallel_state=ALONE,
        unconcat_tokens=[torch.zeros(5), torch.zeros(4)],
        total_lengths=[5, 4],
        response_lengths=[3, 0],
    )
    assert [row.tolist() for row in got["values"]] == [[0.5, 1.0, 1.5], []]
