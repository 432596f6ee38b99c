"""`miles.loss.logprobs` for a vocabulary whose rows are cut over the ranks of a tensor-parallel group.

    rank                        0            1            2
    rows of the projection      0 1 2 3      4 5 6 7      8 9 10 11      [V / tp, D] each
    tokens (10 of them)         0 1 2 3      4 5 6 7      8 9  .  .      padding rows take no part

Every rank has the same hidden states and targets, and gets the same log-probs and entropies. Per chunk of tokens two
all-reduces travel: the largest logit, then the sums of the softmax, [3, chunk] numbers. Backward passes communicate
nothing: the gradients of `weight` and of logits are those of this rank's rows, and the gradient of `hidden` is THIS
RANK'S PART of it. Its sum over the ranks is the gradient; the caller makes it, by taking `hidden` through a copy whose
backward all-reduces (Megatron's `copy_to_tensor_model_parallel_region`) or a gather whose backward reduce-scatters.

Without a group, or in a group of one, both functions are those of `miles.loss.logprobs` on the rows that are tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from miles.loss import logprobs
from miles.loss.logprobs import CHUNK_ELEMENTS, Buffers, LinearLogProbs, TokenLogProbs, chunks, scaled_logits
from miles.loss.parallel_state import ParallelState


class VocabularyShard(NamedTuple):
    """Which rows this rank has: `real_rows` tokens from `first_row` on, and padding after them.

    Example, the last rank of the drawing: `VocabularyShard(group, first_row=8, real_rows=2)`.
    """

    group: dist.ProcessGroup | None
    first_row: int
    real_rows: int


def shard_of(parallel_state: ParallelState, rows: int) -> VocabularyShard:
    """Of a rank that holds `rows` rows (V / tp, the same number on every rank)."""
    if parallel_state.tp_size > 1 and parallel_state.tp_group is None:
        raise ValueError(f"ParallelState: tp_size {parallel_state.tp_size} without a tp_group")
    first_row = parallel_state.tp_rank * rows
    total = parallel_state.tp_size * rows if parallel_state.vocab_size is None else parallel_state.vocab_size
    return VocabularyShard(parallel_state.tp_group, first_row, min(max(total - first_row, 0), rows))


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None,
    first_row: int = 0,
    real_rows: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> TokenLogProbs:
    """log softmax(hidden @ W.T / temperature) at `targets`, and the entropy, where `weight` is this rank's part of W.

    `hidden` [T, D] and `targets` int64 [T] (token ids) are the same on every rank of `group`; `weight` [V / tp, D] has
    the rows from `first_row` on, of which the first `real_rows` are tokens (None: all of them). `chunk_tokens` as in
    `miles.loss.logprobs`; the same on every rank. See the head of this file for the gradients.
    """
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_ELEMENTS // weight.shape[0], 1)  # of all rows: ranks must agree on it
    rows = weight if real_rows is None or real_rows == weight.shape[0] else weight[:real_rows]
    if is_whole(group):
        return logprobs.linear_log_probs(
            hidden, rows, targets, temperature=temperature, with_entropy=with_entropy, chunk_tokens=chunk_tokens
        )
    log_probs, entropy = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, rows, targets, temperature, with_entropy, chunk_tokens, group, first_row
    )
    return TokenLogProbs(log_probs, entropy)


def log_probs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None,
    first_row: int = 0,
    real_rows: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenLogProbs:
    """The same from this rank's columns of the logits, [T, V / tp]; -inf logits (tokens that cannot occur) are allowed.

    Differentiable: the gradient of `logits` is that of this rank's columns, 0 in padding.
    """
    columns = logits if real_rows is None or real_rows == logits.shape[1] else logits[:, :real_rows]
    if is_whole(group):
        return logprobs.log_probs_from_logits(columns, targets, temperature=temperature, with_entropy=with_entropy)
    log_probs, entropy = _LogProbs.apply(  # type: ignore[no-untyped-call]
        columns, targets, temperature, with_entropy, group, first_row
    )
    return TokenLogProbs(log_probs, entropy)


def is_whole(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_world_size(group) == 1


class Reduced(NamedTuple):
    """Of one chunk of tokens, over the whole vocabulary: the log-prob of each target, the log of the softmax's
    denominator with and without the largest logit, and the entropy; [chunk] each."""

    log_probs: Tensor
    normalizers: Tensor
    log_total: Tensor
    entropy: Tensor


def local_targets(targets: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """(places in this rank's rows [T], whether they are there bool [T]); the place of one that is not is 0."""
    places = targets - first_row
    here = (places >= 0) & (places < rows)
    return places.masked_fill(~here, 0), here


def reduce_chunk(
    z: Tensor, exponentials: Tensor, places: Tensor, here: Tensor, group: dist.ProcessGroup | None, entropy: bool
) -> Reduced:
    """The softmax of this rank's logits `z` [chunk, rows] together with those of the others. In place: `z` loses the
    largest logit, `exponentials` (which may be `z` itself) get exp of that."""
    top = z.amax(-1) if z.shape[1] else z.new_full((z.shape[0],), -torch.inf)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    z.sub_(top[:, None])
    sums = z.new_zeros(3, z.shape[0])
    if z.shape[1]:
        sums[0] = z.gather(-1, places[:, None]).squeeze(-1).masked_fill(~here, 0.0)
    torch.exp(z, out=exponentials)
    sums[1] = exponentials.sum(-1)
    if entropy:
        # 0 * log 0 is 0: the floor keeps -inf out of the product.
        sums[2] = torch.linalg.vecdot(exponentials, z.clamp_(min=torch.finfo(z.dtype).min))
    dist.all_reduce(sums, group=group)
    log_total = sums[1].log()
    return Reduced(sums[0] - log_total, top + log_total, log_total, log_total - sums[2] / sums[1])


class _LinearLogProbs(LinearLogProbs):
    """The forward pass of `LinearLogProbs` with sums over the group; its backward pass holds for a part of the rows."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
        first_row: int,
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(torch.float32, hidden.dtype)
        num_tokens = hidden.shape[0]
        places, here = local_targets(targets, first_row, weight.shape[0])
        log_probs = torch.empty(num_tokens, dtype=wide, device=hidden.device)
        entropy = torch.empty_like(log_probs) if with_entropy else None
        normalizers = torch.empty_like(log_probs)
        keep = 0 < num_tokens <= chunk_tokens
        buffers = Buffers(min(num_tokens, chunk_tokens), weight, wide, two=with_entropy or keep)
        for part in chunks(num_tokens, chunk_tokens):
            z, exponentials = scaled_logits(hidden[part], weight, temperature, buffers)
            reduced = reduce_chunk(z, exponentials, places[part], here[part], group, with_entropy)
            log_probs[part], normalizers[part] = reduced.log_probs, reduced.normalizers
            if entropy is not None:
                entropy[part] = reduced.entropy
            if keep:
                z.sub_(reduced.log_total[:, None])
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        kept = buffers.first if keep else None
        ctx.save_for_backward(hidden, weight, places, normalizers, entropy, kept, here)
        return log_probs, entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...] = LinearLogProbs.backward(ctx, grad_log_probs, grad_entropy)
        return (*gradients, None, None)


class _LogProbs(torch.autograd.Function):
    """With l = log p_y and H = -sum p log p of z = logits / temperature: dl/dz = onehot(y) - p, dH/dz = -p (log p + H),
    each rank's columns of them."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        group: dist.ProcessGroup | None,
        first_row: int,
    ) -> tuple[Tensor, Tensor | None]:
        places, here = local_targets(targets, first_row, logits.shape[1])
        z = wide_logits(logits, temperature)
        reduced = reduce_chunk(z, torch.empty_like(z), places, here, group, with_entropy)
        entropy = reduced.entropy if with_entropy else None
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, places, here, reduced.normalizers, entropy)
        return reduced.log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None, None, None]:
        logits, places, here, normalizers, entropy = ctx.saved_tensors
        log_p = wide_logits(logits, ctx.temperature).sub_(normalizers[:, None])
        gradient = log_p.exp().neg_()
        pull = torch.zeros_like(normalizers)[:, None] if grad_log_probs is None else grad_log_probs[:, None]
        if grad_entropy is not None:
            log_p.masked_fill_(log_p == -torch.inf, 0.0)
            pull = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(pull)
        gradient.mul_(pull)
        if grad_log_probs is not None and logits.shape[1]:
            gradient.scatter_add_(-1, places[:, None], grad_log_probs.masked_fill(~here, 0.0)[:, None])
        return gradient.div_(ctx.temperature).to(logits.dtype), None, None, None, None, None


def wide_logits(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32 (float64), in memory of its own."""
    wide = torch.promote_types(torch.float32, logits.dtype)
    return logits.to(wide) / temperature if temperature != 1.0 else logits.to(wide, copy=True)
