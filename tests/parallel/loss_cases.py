"""What losses are compared on: one small micro batch, a table of cases, layouts that cut vocabulary and samples.

`run(case, layout)` is called by one process and by every rank of a group. Hidden states and projection are leaves that
every rank has in full and of which it uses its part, so that the sum of all ranks' gradients is the gradient. Started
as a program it is one rank: `loss_cases.py RANK SIZE FOLDER` runs every case under every layout of its size and leaves
what came out as `<FOLDER>/<layout> <case>.pt`, written by rank 0.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from examples.train_infer_mismatch_helper.mis import compute_mis_weights_with_cp
from miles.backends.training_utils import cp_utils
from miles.backends.training_utils.loss import policy_loss_function, sft_loss_function
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
    icepop_function,
    loss_batch,
)
from miles.loss.context_parallel import gather_response, gathered_log_probs, group_of, local_share
from miles.loss.vocab_parallel import linear_log_probs, log_probs_from_logits, shard_of
from miles.utils import ppo_utils

VOCABULARY, WIDTH, TEMPERATURE = 7, 5, 0.8

# (tokens, of them the response). One without a response, one shorter than the chunks of four ranks, long ones.
ROWS = ((11, 6), (4, 0), (2, 1), (17, 16), (9, 3))
# All of whose response tokens belong to the last of four ranks.
ONE_OWNER = ((11, 2), (3, 0))

# Layout -> (tensor, context) sizes; a rank of tensor parallelism has 4 rows of the vocabulary, so that of four ranks
# the second has one row of padding and two have no row at all.
LAYOUTS = {"tp2": (2, 1), "cp2": (1, 2), "tp2 cp2": (2, 2), "tp4": (4, 1), "cp4": (1, 4)}
ROWS_PER_RANK = 4


@dataclass
class Result:
    """`values` are the same on every rank; `loss` and gradients are sums over the ranks' parts."""

    values: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    weight: Tensor | None = None


@dataclass
class Problem:
    """The same numbers in every process."""

    micro: PackedBatch
    hidden: Tensor  # [T, D], leaf
    weight: Tensor  # [rows of all ranks, D], leaf; those from VOCABULARY on are padding, and large
    head: Tensor  # [D], a critic's
    columns: dict[str, Tensor]  # [R] each


def problem(
    layout: str | None, dtype: torch.dtype = torch.float64, rows: tuple[tuple[int, int], ...] = ROWS
) -> Problem:
    rng = torch.Generator().manual_seed(5)
    tokens = [torch.randint(0, VOCABULARY, (total,), generator=rng).tolist() for total, _ in rows]
    masks = [torch.randint(0, 4, (n,), generator=rng).clamp(max=1).tolist() for _, n in rows]
    lengths = [n for _, n in rows]
    micro = pack(
        from_published_dict({"tokens": tokens, "response_lengths": lengths, "loss_masks": masks}), range(len(rows))
    )

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    hidden, weight, head = noise(len(micro.tokens), WIDTH), noise(VOCABULARY, WIDTH), noise(WIDTH)
    names = ("log_probs", "rollout_log_probs", "ref_log_probs", "advantages", "values", "returns")
    columns = {name: noise(sum(lengths)) * (1.0 if name[0] in "avr" and "log" not in name else 0.4) for name in names}
    for name in names[:3]:
        columns[name] -= 2
    tensor = 1 if layout is None else LAYOUTS[layout][0]
    padded = VOCABULARY if tensor == 1 else tensor * ROWS_PER_RANK
    weight = torch.cat([weight, torch.full((padded - VOCABULARY, WIDTH), 30.0, dtype=dtype)])
    return Problem(micro, hidden.requires_grad_(), weight.requires_grad_(), head, columns)


ALONE = ParallelState()


def local_weight(p: Problem, state: ParallelState) -> Tensor:
    """This rank's rows; alone, those that are tokens."""
    return p.weight if state.tp_size == 1 else p.weight.chunk(state.tp_size)[state.tp_rank]


def local_hidden(p: Problem, state: ParallelState) -> tuple[Tensor, int]:
    """(this rank's packed states with two places of padding at the end, how many those are)."""
    if state.cp_size == 1:
        return torch.cat([p.hidden, p.hidden.new_ones(2, WIDTH)]), len(p.hidden) + 2
    share = local_share(state, p.micro.total_lengths, p.micro.response_lengths, "cpu")
    return torch.cat([share.local_tokens(p.hidden, 3.0), p.hidden.new_ones(2, WIDTH)]), share.num_places + 2


def finished(p: Problem, values: dict[str, Tensor], loss: Tensor) -> Result:
    loss.backward()
    gradients = [p.hidden.grad, p.weight.grad]
    whole = []
    for gradient, leaf in zip(gradients, (p.hidden, p.weight)):
        total = torch.zeros_like(leaf) if gradient is None else gradient
        if dist.is_initialized():
            dist.all_reduce(total)
        whole.append(total)
    return Result({name: value.detach() for name, value in values.items()}, *whole)


# ---- log-probs -------------------------------------------------------------------------------------------------------


def pull_of(log_probs: Tensor, entropy: Tensor | None, size: int) -> Tensor:
    """A scalar that pulls at every token differently."""
    pull = torch.linspace(-1, 2, size, dtype=log_probs.dtype)
    loss = (log_probs * pull).sum()
    return loss if entropy is None else loss + (entropy * pull.flip(0) ** 2).sum()


def linear(
    p: Problem, state: ParallelState, *, with_entropy: bool = True, chunk: int | None = None, only: str = ""
) -> Result:
    weight = local_weight(p, state)
    shard = shard_of(state, len(weight))._asdict()
    got = linear_log_probs(
        p.hidden[p.micro.predicting], weight, p.micro.targets, temperature=TEMPERATURE, with_entropy=with_entropy,
        chunk_tokens=chunk, **shard,
    )  # fmt: skip
    values = {"log_probs": got.log_probs, **({} if got.entropy is None else {"entropy": got.entropy})}
    if only == "entropy":
        assert got.entropy is not None
        return finished(p, values, pull_of(got.entropy, None, len(got.entropy)))
    return finished(p, values, pull_of(got.log_probs, got.entropy, len(got.log_probs)))


def from_logits(p: Problem, state: ParallelState, *, with_entropy: bool = True, impossible: bool = False) -> Result:
    weight = local_weight(p, state)
    shard = shard_of(state, len(weight))
    logits = p.hidden[p.micro.predicting] @ weight.T
    if impossible:  # a token that cannot occur, and is no target
        logits = logits.masked_fill(torch.arange(len(weight)) + shard.first_row == IMPOSSIBLE, -torch.inf)
    targets = p.micro.targets.masked_fill(p.micro.targets == IMPOSSIBLE, 0)
    got = log_probs_from_logits(
        logits, targets, temperature=TEMPERATURE, with_entropy=with_entropy, **shard._asdict()
    )
    values = {"log_probs": got.log_probs, **({} if got.entropy is None else {"entropy": got.entropy})}
    return finished(p, values, pull_of(got.log_probs, got.entropy, len(got.log_probs)))


IMPOSSIBLE = 5


def no_token(p: Problem, state: ParallelState) -> Result:
    weight = local_weight(p, state)
    got = linear_log_probs(
        p.hidden[:0], weight, p.micro.targets[:0], with_entropy=True, **shard_of(state, len(weight))._asdict()
    )
    assert got.entropy is not None
    return finished(p, {"log_probs": got.log_probs, "entropy": got.entropy}, (got.log_probs + got.entropy).sum())


def of_ppo_utils(p: Problem, state: ParallelState) -> Result:
    """The published formulas, which know of no padding: there is none where every rank has its share of 6 tokens."""
    rows = slice(0, 6) if state.tp_size == 1 else slice(state.tp_rank * 3, state.tp_rank * 3 + 3)
    logits = p.hidden[p.micro.predicting] @ p.weight[rows].T
    targets = p.micro.targets.clamp(max=5)
    log_probs, entropy = ppo_utils.calculate_log_probs_and_entropy(logits, targets, state.tp_group, True, 4)
    assert entropy is not None
    again = ppo_utils.compute_entropy_from_logits(logits, state.tp_group)
    values = {"log_probs": log_probs, "entropy": entropy, "again": again}
    return finished(p, values, pull_of(log_probs[:, 0], entropy, len(entropy)))


# ---- built-in losses -------------------------------------------------------------------------------------------------


def flags(**given: Any) -> LossSettings:
    return LossSettings(**{"eps_clip": 0.2, "eps_clip_high": 0.28, **given})


def built_in(
    p: Problem, state: ParallelState, settings: LossSettings, tis: Any = None, pg_reducer: Any = None, **given: Any
) -> Result:
    args = Namespace(**vars(settings), **given)
    plugins = LossPlugins(tis=tis, pg_reducer=pg_reducer, args=args, parallel_state=state)
    inputs = inputs_of(p, state, settings)
    result = compute_loss(inputs, settings, plugins, 0.5)
    return finished(p, {"loss": result.loss, **result.metrics}, result.loss)


def inputs_of(p: Problem, state: ParallelState, settings: LossSettings) -> LossInputs:
    """As a backend makes them: each rank's own states, then whole columns on every rank."""
    share = local_share(state, p.micro.total_lengths, p.micro.response_lengths, "cpu")
    hidden, group = local_hidden(p, state)[0], group_of(state)
    states = hidden.index_select(0, share.places)
    if settings.loss_type == "value_loss":
        values = gather_response(states @ p.head, share, group)
        return LossInputs.of_values(p.micro, values, p.columns)
    weight = local_weight(p, state)
    own = linear_log_probs(
        states, weight, p.micro.targets[share.own], temperature=TEMPERATURE,
        with_entropy=settings.loss_type == "policy_loss", **shard_of(state, len(weight))._asdict(),
    )  # fmt: skip
    return LossInputs.of(p.micro, gathered_log_probs(own, share, group), p.columns)


def mpu_size() -> tuple[int, int]:
    """(rank, size) of context parallelism as Megatron knows them; one process has no Megatron."""
    if not dist.is_initialized():
        return 0, 1
    from megatron.core import mpu

    return mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()


def reducer_of_mpu(
    total_lengths: list[int], response_lengths: list[int], masks: list[Tensor], per_token: bool
) -> Callable[[Tensor], Tensor]:
    """A published reducer: it is given no parallel_state, and asks Megatron where it is."""
    rank, size = mpu_size()
    state = ParallelState(cp_rank=rank, cp_size=size)
    assert [len(mask) for mask in masks] == response_lengths
    rows = zip(masks, total_lengths, response_lengths)
    mask = torch.cat([cp_utils.slice_log_prob_with_cp(*row, state) for row in rows])
    return lambda x: (x.square() * mask).sum() / 36.0


def reducer_that_ignores_empty_parts(
    total_lengths: list[int], response_lengths: list[int], masks: list[Tensor], per_token: bool
) -> Callable[[Tensor], Tensor]:
    """What it returns where it is given nothing has no gradient."""
    return lambda x: x.sin().sum() if len(x) else torch.zeros((), dtype=x.dtype)


def sequence_weights(
    *, args: Any, pg_loss: Tensor, train_log_probs: list[Tensor], rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor], total_lengths: list[int], response_lengths: list[int], parallel_state: ParallelState,
) -> Any:  # fmt: skip
    """A published importance function: weights and rejections by sequence, from gathered log-probs. The loss itself is
    changed by a function that is not linear, with gradient."""
    weights, masks = [], []
    for train, rollout, mask, total, n in zip(
        train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths
    ):
        d = cp_utils.all_gather_with_cp(train - rollout, total, n, parallel_state)
        ratio = torch.exp((d * mask).sum() / mask.sum().clamp(min=1))
        masks.append(mask * (d.abs() < 0.7))
        weights.append(cp_utils.slice_log_prob_with_cp(ratio.expand(n), total, n, parallel_state))
    flat = torch.cat(weights)
    assert flat.shape == pg_loss.shape
    return torch.tanh(pg_loss) * flat, masks, {"weight": flat}


def ignores_what_is_empty(*, pg_loss: Tensor, loss_masks: list[Tensor], **given: Any) -> Any:
    return pg_loss.sinh() if len(pg_loss) else torch.zeros_like(pg_loss), loss_masks, {}


def icepop(**given: Any) -> Any:
    return icepop_function(**given)


MIS = {
    "tis_level": "sequence", "tis_mode": "clip", "tis_upper_bound": 1.2, "tis_batch_normalize": True, "use_rs": True,
    "rs_level": "geometric", "rs_upper_bound": 2.0, "rs_veto_threshold": 0.55,
}  # fmt: skip


# ---- custom losses ---------------------------------------------------------------------------------------------------


def custom(p: Problem, state: ParallelState, fn: Any, *, per_token: bool = False, **given: Any) -> Result:
    hidden, num_places = local_hidden(p, state)
    logits = (hidden @ local_weight(p, state).T)[None]
    batch = loss_batch(p.micro, p.columns, parallel_state=state, num_places=num_places)
    assert batch["tokens"].shape == batch["full_loss_masks"].shape == logits.shape[:2]
    defaults = {
        **{f.name: getattr(flags(), f.name) for f in fields(LossSettings)}, "custom_tis_function_path": None,
        "custom_pg_loss_reducer_function_path": None, "rollout_temperature": TEMPERATURE,
    }  # fmt: skip
    args = Namespace(**{**defaults, **given})
    result = custom_loss(fn, args, state, p.micro, batch, logits, per_token=per_token, scale=0.5)
    total = result.loss.detach().clone()
    if state.cp_size > 1:
        dist.all_reduce(total, group=state.cp_group)
    return finished(p, {"loss": total, **result.metrics}, result.loss)


def rows_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}


def with_the_published_helpers(
    args: Any, parallel_state: ParallelState, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> Any:
    """GSPO: the ratio of each sequence from gathered log-probs, an entropy bonus, and a term of whole sequences."""
    data = get_log_probs_and_entropy(
        logits, args=args, parallel_state=parallel_state, with_entropy=True, **rows_of(batch)
    )
    lengths = list(zip(batch["total_lengths"], batch["response_lengths"]))
    full, full_old = (
        [cp_utils.all_gather_with_cp(row, *both, parallel_state) for row, both in zip(column, lengths)]
        for column in (data["log_probs"], batch["log_probs"])
    )
    kl = ppo_utils.compute_gspo_kl(full, full_old, data["log_probs"], batch["loss_masks"])
    pg, clipped = ppo_utils.compute_policy_loss(kl, torch.cat(batch["advantages"]), 0.2, 0.28)
    cubes = [row.pow(3).cumsum(0) / 50 for row in full]  # every token reads those before it, of other ranks too
    own = [cp_utils.slice_log_prob_with_cp(row, *both, parallel_state) for row, both in zip(cubes, lengths)]
    entropy = sum_of_sample_mean(torch.cat(data["entropy"]))
    loss = sum_of_sample_mean(pg) - 0.1 * entropy + sum_of_sample_mean(torch.cat(own))
    return loss, {"loss": loss.detach(), "entropy": entropy, "clipped": sum_of_sample_mean(clipped), "parts": 1.0}


def with_a_reducer_of_its_own(
    args: Any, parallel_state: ParallelState, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> Any:
    lengths = batch["total_lengths"], batch["response_lengths"]
    reduce = cp_utils.get_sum_of_sample_mean(*lengths, batch["loss_masks"], parallel_state, True)
    z = get_responses(logits, args=args, parallel_state=parallel_state, **rows_of(batch))
    loss = reduce(torch.cat([predicting[:, :3].sum(-1) if parallel_state.tp_rank == 0 else 0 * predicting.sum(-1)
                             for predicting, _ in z]))  # fmt: skip
    mask = (logits[0].detach().sum(-1) * batch["full_loss_masks"][0]).abs()
    whole = mask.sum()
    if parallel_state.tp_size > 1:
        return loss, {}
    return loss, {"predicting": whole}


def policy_and_a_term(
    args: Any, parallel_state: ParallelState, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> Any:
    """A built-in loss and a term of one's own."""
    loss, metrics = policy_loss_function(args, parallel_state, batch, logits, sum_of_sample_mean)
    sft, _ = sft_loss_function(args, parallel_state, batch, logits, sum_of_sample_mean)
    return loss + 0.3 * sft, metrics | {"sft": sft.detach()}


def other_metrics_per_rank(
    args: Any, parallel_state: ParallelState, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> Any:
    return logits.sum(), {f"of rank {parallel_state.cp_rank}": 1.0}


# ---- cases -----------------------------------------------------------------------------------------------------------


TENSOR, CONTEXT = ("tp2", "tp4"), ("cp2", "cp4", "tp2 cp2")
CUSTOM = ("tp2", "cp2", "cp4", "tp2 cp2")


@dataclass(frozen=True)
class Case:
    run: Callable[..., Result]
    given: dict[str, Any] = field(default_factory=dict)
    layouts: tuple[str, ...] = TENSOR
    dtype: torch.dtype = torch.float64
    rows: tuple[tuple[int, int], ...] = ROWS


def loss(tis: Any = None, pg_reducer: Any = None, layouts: tuple[str, ...] = CONTEXT, args: Any = None, **given: Any):
    plugins = {"tis": tis, "pg_reducer": pg_reducer, **(args or {})}
    return Case(built_in, {"settings": flags(**given), **plugins}, layouts)


HERE = Path(__file__).stem
CASES: dict[str, Case] = {
    "linear": Case(linear),
    "linear in chunks": Case(linear, {"chunk": 5}),
    "linear without entropy": Case(linear, {"with_entropy": False}),
    "linear without entropy in chunks": Case(linear, {"with_entropy": False, "chunk": 7}),
    "linear, the entropy alone": Case(linear, {"only": "entropy"}),
    "linear float32": Case(linear, dtype=torch.float32),
    "linear float32 in chunks": Case(linear, {"chunk": 5}, dtype=torch.float32),
    "linear bfloat16": Case(linear, {"chunk": 5}, dtype=torch.bfloat16),
    "logits": Case(from_logits),
    "logits without entropy": Case(from_logits, {"with_entropy": False}),
    "logits float32": Case(from_logits, dtype=torch.float32),
    "impossible tokens": Case(from_logits, {"impossible": True}),
    "no token": Case(no_token),
    "ppo_utils": Case(of_ppo_utils, layouts=("tp2",)),
    "ppo": loss(entropy_coef=0.1),
    "dual clip": loss(eps_clip_c=1.5),
    "gspo": loss(advantage_estimator="gspo", entropy_coef=0.1),
    "cispo": loss(advantage_estimator="cispo"),
    "dr_grpo": loss(advantage_estimator="dr_grpo", rollout_max_response_len=20),
    "per token": loss(calculate_per_token_loss=True),
    "kl": loss(use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type="low_var_kl", use_unbiased_kl=True),
    "opsm": loss(use_opsm=True),
    "opsm of gspo": loss(use_opsm=True, advantage_estimator="gspo"),
    "tis": loss(use_tis=True),
    "rollout log-probs": loss(use_rollout_logprobs=True),
    "sft": loss(loss_type="sft_loss"),
    "value": loss(loss_type="value_loss", layouts=("cp2", "cp4")),
    "icepop as a plug-in": loss(tis=icepop, use_tis=True, tis_clip_low=0.7, tis_clip=1.3),
    "a plug-in by sequence": loss(tis=sequence_weights, use_tis=True),
    "a plug-in by sequence, gspo": loss(tis=sequence_weights, use_tis=True, advantage_estimator="gspo"),
    "a plug-in that only measures": loss(tis=sequence_weights, get_mismatch_metrics=True, advantage_estimator="gspo"),
    "mis": loss(tis=compute_mis_weights_with_cp, use_tis=True, advantage_estimator="gspo", args=MIS),
    "a reducer": loss(pg_reducer=reducer_of_mpu, layouts=("cp2",)),
    "a reducer, gspo": loss(pg_reducer=reducer_of_mpu, layouts=("cp2",), advantage_estimator="gspo"),
    "a reducer and a plug-in, gspo": loss(
        sequence_weights, reducer_of_mpu, ("cp2",), use_tis=True, advantage_estimator="gspo", entropy_coef=0.1
    ),
    "ranks without a token": Case(built_in, {"settings": flags(entropy_coef=0.1)}, CONTEXT, rows=ONE_OWNER),
    "plug-ins that ignore what is empty": Case(
        built_in,
        {
            "settings": flags(advantage_estimator="gspo", use_tis=True), "tis": ignores_what_is_empty,
            "pg_reducer": reducer_that_ignores_empty_parts,
        },
        CONTEXT,
        rows=ONE_OWNER,
    ),
    "a custom loss of ranks without a token": Case(
        custom, {"fn": with_the_published_helpers}, CUSTOM, rows=ONE_OWNER
    ),
    "custom": Case(custom, {"fn": with_the_published_helpers}, CUSTOM),
    "custom per token": Case(custom, {"fn": with_the_published_helpers, "per_token": True}, CUSTOM),
    "custom with a reducer": Case(custom, {"fn": with_a_reducer_of_its_own}, ("cp2", "cp4")),
    "built on the policy loss": Case(custom, {"fn": policy_and_a_term, "entropy_coef": 0.1}, CUSTOM),
    "built on the policy loss, gspo with plug-ins": Case(
        custom,
        {
            "fn": policy_and_a_term, "advantage_estimator": "gspo", "use_tis": True,
            "custom_tis_function_path": f"{HERE}.sequence_weights",
            "custom_pg_loss_reducer_function_path": f"{HERE}.reducer_of_mpu",
        },
        ("cp2",),
    ),
}  # fmt: skip


def run(name: str, layout: str | None, state: ParallelState = ALONE) -> Result:
    case = CASES[name]
    return case.run(problem(layout, case.dtype, case.rows), state, **case.given)


# ---- other things that ranks find out --------------------------------------------------------------------------------


def largest_tensor(state: ParallelState) -> int:
    """Elements of the largest tensor that 400 tokens make in chunks of 40, with 2,000 rows on this rank."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, weight = torch.ones(400, 2, requires_grad=True), torch.ones(2000, 2, requires_grad=True)
    with Watch():
        got = linear_log_probs(
            hidden, weight, torch.arange(400), with_entropy=True, chunk_tokens=40,
            group=state.tp_group, first_row=2000 * state.tp_rank,
        )  # fmt: skip
        pull_of(got.log_probs, got.entropy, 400).backward()
    return largest


def cut_by_megatron(state: ParallelState) -> tuple[list[int], list[int]]:
    """This rank's tokens of the rows, as we cut them and as Megatron cuts each of the padded rows."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    share = local_share(state, [total for total, _ in ROWS], [n for _, n in ROWS], "cpu")
    tokens = torch.arange(1, sum(total for total, _ in ROWS) + 1)
    theirs = []
    for row, length in zip(tokens.split([total for total, _ in ROWS]), share.local_lengths.tolist()):
        padded = torch.nn.functional.pad(row, (0, length * state.cp_size - len(row)))
        theirs += get_batch_on_this_cp_rank({"tokens": padded[None]}, state.cp_group)["tokens"][0].tolist()
    return share.local_tokens(tokens).tolist(), theirs


# ---- a rank ----------------------------------------------------------------------------------------------------------


def state_in(layout: str, rank: int, size: int) -> ParallelState:
    """Rank = tensor rank + tensor size * context rank, as in Megatron. Every rank makes every group."""
    tensor, context = LAYOUTS[layout]
    assert tensor * context == size
    tensor_groups = [dist.new_group([c * tensor + t for t in range(tensor)]) for c in range(context)]
    context_groups = [dist.new_group([c * tensor + t for c in range(context)]) for t in range(tensor)]
    t, c = rank % tensor, rank // tensor
    return ParallelState(
        cp_rank=c, cp_size=context, cp_group=context_groups[t], dp_cp_rank=c, dp_cp_size=context, tp_size=tensor,
        tp_rank=t, tp_group=tensor_groups[c], vocab_size=VOCABULARY,
    )  # fmt: skip


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store of losses {size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    if size == 2:
        from megatron.core import mpu

        mpu.initialize_model_parallel(context_parallel_size=2)
    for layout in [name for name, (tensor, context) in LAYOUTS.items() if tensor * context == size]:
        state = state_in(layout, rank, size)
        for name, case in CASES.items():
            if layout in case.layouts:
                result = run(name, layout, state)
                if rank == 0:
                    torch.save(vars(result), folder / f"{layout} {name}.pt")
        if layout in TENSOR:
            (folder / f"{layout} largest tensor of rank {rank}").write_text(str(largest_tensor(state)))
        if layout == "cp2":
            torch.save(cut_by_megatron(state), folder / f"cut by Megatron for {rank}.pt")
        if state.cp_size > 1:
            try:
                custom(problem(layout), state, other_metrics_per_rank)
            except UsageError as error:
                (folder / f"{layout} error of rank {rank}").write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
