"""The published functions, and a custom loss called with the published arguments."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles.batch import PackedBatch, from_published_dict, pack
from miles.errors import UsageError
from miles.loss import (
    LossInputs,
    LossPlugins,
    LossSettings,
    ParallelState,
    compute_loss,
    custom_loss,
    get_log_probs_and_entropy,
    get_responses,
    linear_log_probs,
    loss_batch,
)

ARGS = Namespace(rollout_temperature=0.8)
ONE = ParallelState.single_process()


def packed() -> PackedBatch:
    data = {
        "tokens": [[1, 2, 3, 4, 5], [6, 5], [4, 3, 2]],
        "response_lengths": [3, 0, 1],
        "loss_masks": [[1, 0, 1], [], [1]],
    }
    return pack(from_published_dict(data), [0, 1, 2])


def logits_for(micro: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(micro.tokens), 4, generator=generator).requires_grad_()
    weight = torch.randn(7, 4, generator=generator).requires_grad_()
    return hidden, weight, (hidden @ weight.T)[None]


def published_arguments(micro: PackedBatch, batch: dict[str, Any]) -> dict[str, Any]:
    names = ("unconcat_tokens", "total_lengths", "response_lengths")
    return {"args": ARGS, "parallel_state": ONE, **{name: batch[name] for name in names}}


def test_responses_are_the_predicting_logits_and_their_tokens() -> None:
    micro = packed()
    _, _, logits = logits_for(micro)
    got = list(get_responses(logits, **published_arguments(micro, loss_batch(micro, {}))))
    assert [tokens.tolist() for _, tokens in got] == [[3, 4, 5], [], [2]]
    assert [tuple(z.shape) for z, _ in got] == [(3, 7), (0, 7), (1, 7)]
    torch.testing.assert_close(got[0][0], logits[0, 1:4] / 0.8)
    torch.testing.assert_close(got[2][0], logits[0, 8:9] / 0.8)


def test_log_probs_equal_the_fused_ones() -> None:
    """The published route over logits and the built-in route over hidden states give the same numbers."""
    micro = packed()
    hidden, weight, logits = logits_for(micro)
    data = get_log_probs_and_entropy(logits, **published_arguments(micro, loss_batch(micro, {})), with_entropy=True)
    fused = linear_log_probs(hidden[micro.predicting], weight, micro.targets, temperature=0.8, with_entropy=True)
    assert fused.entropy is not None
    assert [len(x) for x in data["log_probs"]] == [len(x) for x in data["entropy"]] == [3, 0, 1]
    torch.testing.assert_close(torch.cat(data["log_probs"]), fused.log_probs)
    torch.testing.assert_close(torch.cat(data["entropy"]), fused.entropy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_state": ParallelState(tp_size=2)}, "tp_size 2 without a tp_group"),
        ({"parallel_state": ParallelState(cp_size=2), "max_seq_lens": [8, 8, 8]}, "max_seq_lens: .* cp_size is 2"),
    ],
)
def test_layouts_it_cannot_read_are_refused(change: dict[str, Any], message: str) -> None:
    micro = packed()
    arguments = published_arguments(micro, loss_batch(micro, {})) | change
    with pytest.raises(ValueError, match=message):
        get_log_probs_and_entropy(torch.zeros(1, 10, 7), **arguments)


def test_padded_rows_are_read_like_packed_ones() -> None:
    """bshd: logits [B, S, V], rows padded to S; log-probs and gradient are those of the packed layout."""
    micro, state = packed(), ParallelState.single_process()
    hidden, _, logits = logits_for(micro)
    batch = loss_batch(micro, {"advantages": torch.arange(4.0)}, parallel_state=state, max_seq_len=6)
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 0], [6, 5, 0, 0, 0, 0], [4, 3, 2, 0, 0, 0]]
    assert batch["full_loss_masks"].tolist() == [[0, 1, 0, 1, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [list(range(6))] * 3 and batch["max_seq_lens"] == [6, 6, 6]
    assert batch["cu_seqlens"] is None and batch["max_seqlen"] is None
    assert [row.tolist() for row in batch["advantages"]] == [[0.0, 1.0, 2.0], [], [3.0]]
    rows = [F.pad(row, (0, 0, 0, 6 - len(row)), value=9.0) for row in logits[0].split(micro.total_lengths)]
    given = published_arguments(micro, batch) | {"max_seq_lens": batch["max_seq_lens"]}
    padded = get_log_probs_and_entropy(torch.stack(rows), **given)["log_probs"]
    plain = get_log_probs_and_entropy(logits, **published_arguments(micro, loss_batch(micro, {})))["log_probs"]
    assert [len(row) for row in padded] == [3, 0, 1]
    torch.testing.assert_close(torch.cat(padded), torch.cat(plain))
    gradients = [torch.autograd.grad(torch.cat(x).sum(), hidden, retain_graph=True)[0] for x in (padded, plain)]
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="expected a cp_size of 1, got 2"):
        loss_batch(micro, {}, parallel_state=ParallelState(cp_size=2), max_seq_len=6)


def test_rows_of_the_projection_that_are_no_token() -> None:
    """A vocabulary of 7 padded to 9 rows: `vocab_size` takes the others out of the softmax."""
    micro = packed()
    _, _, logits = logits_for(micro)
    wide = torch.cat([logits, torch.full((1, 10, 2), 5.0)], dim=-1)
    given = published_arguments(micro, loss_batch(micro, {}))
    cut = get_log_probs_and_entropy(wide, **given | {"parallel_state": ParallelState(vocab_size=7)}, with_entropy=True)
    plain = get_log_probs_and_entropy(logits, **given, with_entropy=True)
    for name in ("log_probs", "entropy"):
        assert all(torch.equal(a, b) for a, b in zip(cut[name], plain[name], strict=True))


def test_tokens_that_the_backend_padded() -> None:
    """The end of the packed tokens is a row of its own, as published."""
    batch = loss_batch(packed(), {}, num_places=12, packed_seq_params="theirs")
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 0, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 5, 7, 10, 12] and batch["max_seqlen"] == 5
    assert batch["cu_seqlens"].dtype == torch.int32 and batch["packed_seq_params"] == "theirs"
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 0, 1]]
    assert batch["full_loss_masks"].tolist() == [[0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0]]


def test_the_batch_of_a_rank_that_owns_a_part() -> None:
    """Rows of 5, 2 and 3 tokens on 2 ranks, in chunks of 2, 1 and 1; the first two response tokens of the first row and
    that of the last are scored on rank 1."""
    micro = packed()
    column = {"advantages": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    first, second = (
        loss_batch(micro, column, parallel_state=ParallelState(cp_rank=r, cp_size=2), num_places=10) for r in range(2)
    )
    assert first["tokens"].tolist() == [[1, 2, 0, 0, 6, 0, 4, 0, 0, 0]]
    assert second["tokens"].tolist() == [[3, 4, 5, 0, 5, 0, 3, 2, 0, 0]]
    assert [row.tolist() for row in first["advantages"]] == [[1.0], [], []]
    assert [row.tolist() for row in second["advantages"]] == [[2.0, 3.0], [], [4.0]]
    assert first["full_loss_masks"].tolist() == [[0, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert second["full_loss_masks"].tolist() == [[0, 1, 0, 0, 0, 0, 1, 0, 0, 0]]
    for batch in (first, second):
        assert batch["cu_seqlens"].tolist() == [0, 8, 12, 16, 20] and batch["max_seqlen"] == 8
        assert [row.tolist() for row in batch["loss_masks"]] == [[1, 0, 1], [], [1]]
        assert [row.tolist() for row in batch["unconcat_tokens"]] == [[1, 2, 3, 4, 5], [6, 5], [4, 3, 2]]


def test_half_precision_logits_are_refused() -> None:
    micro = packed()
    with pytest.raises(ValueError, match="expected float32 logits"):
        get_log_probs_and_entropy(torch.zeros(1, 10, 7).bfloat16(), **published_arguments(micro, loss_batch(micro, {})))


def test_the_batch_of_a_custom_loss() -> None:
    micro = packed()
    batch = loss_batch(micro, {"advantages": torch.tensor([1.0, 2.0, 3.0, 4.0])}, dynamic_global_batch_size=6)
    assert set(batch) == {
        "tokens", "unconcat_tokens", "packed_seq_params", "cu_seqlens", "max_seqlen", "position_ids", "total_lengths",
        "response_lengths", "loss_masks", "full_loss_masks", "max_seq_lens", "multimodal_train_inputs",
        "multimodal_num_items", "log_probs", "ref_log_probs", "values", "advantages", "returns", "rollout_log_probs",
        "dynamic_global_batch_size",
    }  # fmt: skip
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 6, 5, 4, 3, 2]]
    assert [row.tolist() for row in batch["unconcat_tokens"]] == [[1, 2, 3, 4, 5], [6, 5], [4, 3, 2]]
    assert [row.tolist() for row in batch["loss_masks"]] == [[1, 0, 1], [], [1]]
    assert batch["full_loss_masks"].tolist() == [[0, 1, 0, 1, 0, 0, 0, 0, 1, 0]]
    assert [row.tolist() for row in batch["advantages"]] == [[1.0, 2.0, 3.0], [], [4.0]]
    assert batch["log_probs"] is None and "dynamic_global_batch_size" not in loss_batch(micro, {})


@pytest.mark.parametrize("per_token", [False, True])
def test_a_custom_loss_equals_the_built_in_one(per_token: bool) -> None:
    """SFT written as a plug-in, from logits, has the loss and gradient of the built-in one."""

    def plug_in(args: Any, parallel_state: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
        data = get_log_probs_and_entropy(
            logits,
            args=args,
            parallel_state=parallel_state,
            unconcat_tokens=batch["unconcat_tokens"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
        )
        loss = -sum_of_sample_mean(torch.cat(data["log_probs"]))
        return loss, {"loss": loss, "a_number": 3}

    micro = packed()
    hidden, weight, logits = logits_for(micro)
    mine = custom_loss(plug_in, ARGS, ONE, micro, loss_batch(micro, {}), logits, per_token=per_token, scale=0.25)
    mine.loss.backward()
    my_gradient, hidden.grad = hidden.grad, None
    flags = LossSettings(loss_type="sft_loss", calculate_per_token_loss=per_token)
    current = linear_log_probs(hidden[micro.predicting], weight, micro.targets, temperature=0.8)
    built_in = compute_loss(LossInputs.of(micro, current, {}), flags, LossPlugins(), 0.25)
    built_in.loss.backward()
    torch.testing.assert_close(mine.loss, built_in.loss)
    torch.testing.assert_close(my_gradient, hidden.grad)
    torch.testing.assert_close(mine.metrics["loss"], built_in.metrics["loss"])
    assert float(mine.metrics["a_number"]) == 3 and not mine.metrics["loss"].requires_grad


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda z: z.sum(), r"expected a pair \(loss, metrics\), got Tensor"),
        (lambda z: (1.0, {}), "expected the loss as a scalar tensor with gradient"),
        (lambda z: (z[0, 0], {}), "expected the loss as a scalar tensor with gradient"),
        (lambda z: (z.detach().sum(), {}), "expected the loss as a scalar tensor with gradient"),
    ],
)
def test_bad_results_of_a_custom_loss(result: Any, message: str) -> None:
    micro = packed()
    _, _, logits = logits_for(micro)
    with pytest.raises(UsageError, match=message):
        custom_loss(lambda *a: result(a[3]), ARGS, ONE, micro, {}, logits, per_token=False, scale=1.0)


def test_columns_under_their_published_names() -> None:
    """The column `log_probs` is the OLD policy's."""
    micro = packed()
    hidden, weight, _ = logits_for(micro)
    current = linear_log_probs(hidden[micro.predicting], weight, micro.targets)
    old = torch.zeros(4)
    inputs = LossInputs.of(micro, current, {"log_probs": old})
    assert inputs.old_log_probs is old and inputs.log_probs is current.log_probs and inputs.advantages is None
