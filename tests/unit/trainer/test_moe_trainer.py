"""Mixtures of experts in the fsdp backend: the Hugging Face model, with the experts that somebody prescribes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_trainer import EXPERTS, LAYERS, NUMBERS, SAMPLES, TOP_K, make_actor, make_batch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles.batch import TrainBatch, from_published_dict, pack
from miles.engine.embedded import EmbeddedEngine
from miles.errors import UsageError
from miles.loss.logprobs import linear_log_probs
from miles.trainer.actor import TrainActor
from miles.trainer.backend import MicroLoss
from miles.trainer.fsdp.backend import FsdpBackend
from miles.trainer.routing import FREE, RoutingTape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3-MoE, the middle layer dense."""
    path = tmp_path_factory.mktemp("moe") / "model"
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **NUMBERS, moe_intermediate_size=24, num_experts=EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=True,
        mlp_only_layers=[1],
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def backend(folder: Path) -> FsdpBackend:
    return make_actor(folder)[0].backend


Read = tuple[Tensor, Tensor]


def run(backend: FsdpBackend, batch: TrainBatch, rows: list[int], tape: RoutingTape | None, *, share: bool) -> Read:
    """Log-probs of one pass over `rows`, and the experts it took: [P, layers, top_k]."""
    micro = pack(batch, rows, share_prompts=share, experts=None if tape is None else tape.experts)

    taken: list[Tensor] = []

    def read(micro: Any, out: Any) -> Tensor:
        return linear_log_probs(out.hidden[micro.predicting], out.head_weight, micro.targets).log_probs

    def record(micro: Any, experts: Tensor) -> None:
        if tape is not None:
            tape.record(micro, experts)
        taken.append(experts)

    [values] = backend.forward_only([micro], read, record)
    return values, taken[0]


# ---- the model -----------------------------------------------------------------------------------------------------


def test_packed_log_probs_equal_hugging_face(folder: Path, backend: FsdpBackend) -> None:
    batch = make_batch()
    got, _ = run(backend, batch, [*range(SAMPLES)], None, share=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    expected = []
    for i, length in enumerate(batch.response_lengths.tolist()):
        ids = torch.from_numpy(batch.tokens[batch.token_offsets[i] : batch.token_offsets[i + 1]])
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        expected.append(log_p[-length - 1 : -1].gather(1, ids[-length:, None]).squeeze(1))
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=0)


def test_an_export_has_the_names_on_disk_and_a_checkpoint_comes_back(
    folder: Path, backend: FsdpBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles.rollout.tokenizer.load_tokenizer", lambda *_, **__: NoTokenizer())
    backend.export_hf(tmp_path / "hf")
    stored, exported = load_file(folder / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert stored.keys() == exported.keys() and len(backend.weights()) < len(stored)
    assert all(torch.equal(stored[name], exported[name]) for name in stored)
    batch = make_batch()
    before, _ = run(backend, batch, [0, 5], None, share=False)
    (tmp_path / "ck").mkdir()
    backend.save(tmp_path / "ck", with_optimizer=False)
    with torch.no_grad():
        for p in backend.params:
            p.add_(0.1)
    assert not torch.equal(run(backend, batch, [0, 5], None, share=False)[0], before)
    backend.load(tmp_path / "ck", with_optimizer=False)
    assert torch.equal(run(backend, batch, [0, 5], None, share=False)[0], before)


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None: ...


# ---- replay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False], ids=["shared prompts", "own prompts"])
def test_a_replayed_pass_is_the_recorded_one_bit_for_bit(backend: FsdpBackend, share: bool) -> None:
    batch, rows = make_batch(), [0, 1, 2, 5, 6]
    tape = RoutingTape(batch, backend.routing)
    first, taken = run(backend, batch, rows, tape, share=share)
    assert (tape.experts[: batch.token_offsets[3]] >= 0).all()
    assert (tape.experts[batch.token_offsets[3] : batch.token_offsets[5]] == FREE).all()
    again, followed = run(backend, batch, rows, tape, share=share)
    assert torch.equal(again, first) and torch.equal(followed, taken)


def test_given_experts_are_taken_whatever_the_router_thinks(backend: FsdpBackend) -> None:
    batch = make_batch(experts=True)
    tape = RoutingTape.of_engine(batch, backend.routing)
    given = tape.experts.copy()
    with torch.no_grad():
        for module in backend.routers.modules.values():
            module.weight.normal_(std=3.0)
    _, taken = run(backend, batch, [2], tape, share=False)
    own = slice(batch.token_offsets[2], batch.token_offsets[3] - 1)
    np.testing.assert_array_equal(taken[:-1, [0, 2]].numpy(), given[own][:, [0, 2]])
    assert not taken[:, 1].any()  # the dense layer


def test_prompts_are_shared_only_with_equal_experts(backend: FsdpBackend) -> None:
    batch = make_batch()
    tape = RoutingTape(batch, backend.routing)
    run(backend, batch, [0, 1, 2], tape, share=True)
    assert len(pack(batch, [0, 1], share_prompts=True, experts=tape.experts).tokens) == batch.token_offsets[2] - 6
    tape.experts[batch.token_offsets[1] + 2, 0] = tape.experts[batch.token_offsets[1] + 2, 0, ::-1]
    apart = pack(batch, [0, 1, 2], share_prompts=True, experts=tape.experts)
    assert len(apart.tokens) == batch.token_offsets[3] - 6  # 0 and 2 share, 1 has its own
    np.testing.assert_array_equal(apart.routed_experts[apart.row_places], tape.experts[: batch.token_offsets[3]])


@contextmanager
def forced(experts: Tensor) -> Iterator[None]:
    """Hugging Face's own routers with `torch.topk` replaced: experts [layers with experts, P, top_k], call by call."""
    calls, plain = iter(experts), torch.topk

    def topk(probs: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
        chosen = next(calls)
        return probs.gather(-1, chosen), chosen

    torch.topk = topk
    try:
        yield
    finally:
        torch.topk = plain


def reference_gradients(folder: Path, batch: TrainBatch, experts: np.ndarray, rows: list[int]) -> dict[str, Tensor]:
    """Of the sum of log-probs of `rows` under given experts, sample by sample."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    for i in rows:
        own = slice(batch.token_offsets[i], batch.token_offsets[i + 1])
        ids, length = torch.from_numpy(batch.tokens[own]), int(batch.response_lengths[i])
        with forced(torch.from_numpy(experts[own][:, [0, 2]].astype(np.int64)).transpose(0, 1)):
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        log_p[-length - 1 : -1].gather(1, ids[-length:, None]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("flags", [(), ("--gradient-checkpointing",)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("share", [True, False], ids=["shared prompts", "own prompts"])
def test_gradients_under_replay_equal_hugging_face_with_forced_experts(
    folder: Path, flags: tuple[str, ...], share: bool
) -> None:
    """Two micro batches, so that a recomputed layer could follow the wrong one."""
    backend = make_actor(folder, *flags)[0].backend
    batch = make_batch(experts=True)
    tape = RoutingTape.of_engine(batch, backend.routing)
    for i in range(1, 4):  # the rows of a group share the experts of their prompt
        tape.experts[batch.token_offsets[i] : batch.token_offsets[i] + 6] = tape.experts[:6]
    for end in batch.token_offsets[1:]:
        tape.experts[end - 1] = [[0, 1]] * LAYERS

    def loss(micro: Any, out: Any) -> Any:
        values = linear_log_probs(out.hidden[micro.predicting], out.head_weight, micro.targets).log_probs
        return MicroLoss(values.sum(), {})

    micros = [pack(batch, rows, share_prompts=share, experts=tape.experts) for rows in ([0, 1, 2], [3, 4])]
    backend.zero_grad()
    backend.forward_backward(micros, loss)
    expected = reference_gradients(folder, batch, tape.experts, [0, 1, 2, 3, 4])
    for name, p in backend.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert backend.model.model.layers[0].mlp.gate.weight.grad.abs().max() > 1e-3


def spied(actor: TrainActor) -> list[Tensor]:
    """The experts of every pass that this actor makes, each [P, layers, top_k]."""
    seen: list[Tensor] = []
    routers = actor.backend.routers
    following = routers.following

    @contextmanager
    def spy(known: Tensor | None) -> Iterator[None]:
        with following(known):
            yield
            seen.append(routers.taken())

    routers.following = spy
    return seen


def test_training_follows_the_log_prob_pass(folder: Path) -> None:
    """Two steps: the second one's rows are recorded before the first step moves the weights, far, and replayed."""
    flags = ("--use-routing-replay", "--micro-batch-size", "4", "--lr", "0.5", "--clip-grad", "0")
    actor, _ = make_actor(folder, *flags)
    seen = spied(actor)
    actor.train(0, make_batch(), 4)
    recorded, _, second = seen
    assert torch.equal(second, recorded)
    free, _ = make_actor(folder, *flags[1:])
    seen = spied(free)
    free.train(0, make_batch(), 4)
    assert not torch.equal(seen[2], seen[0])


def test_recording_happens_with_rollout_log_probs_too(folder: Path) -> None:
    actor, _ = make_actor(folder, "--use-routing-replay", "--use-rollout-logprobs", "--micro-batch-size", "4")
    seen = spied(actor)
    actor.train(0, make_batch(), 4)
    assert len(seen) == 3 and torch.equal(seen[2], seen[0])


def test_all_passes_follow_the_engine(folder: Path) -> None:
    actor, _ = make_actor(folder, "--use-rollout-routing-replay", "--micro-batch-size", "1")
    seen = spied(actor)
    batch = make_batch(experts=True)
    actor.train(0, batch, 4)
    assert len(seen) == 4 + 4 + 4  # the log-prob pass of the second step's rows, two steps
    by_length = {len(e) + 1: e for e in batch.rollout_routed_experts}
    assert len(by_length) == SAMPLES, "every sample has a length of its own"
    for taken in seen:
        np.testing.assert_array_equal(taken[:-1, [0, 2]].numpy(), by_length[len(taken)][:, [0, 2]])


# ---- what it is for ------------------------------------------------------------------------------------------------


def lagging(backend: FsdpBackend) -> dict[str, Tensor]:
    """Weights a step behind the trainer's."""
    g = torch.Generator().manual_seed(3)
    return {name: t + 2e-3 * torch.randn(t.shape, generator=g) for name, t in backend.weights().items()}


def narrow(backend: FsdpBackend) -> dict[str, Tensor]:
    return {name: t.bfloat16() for name, t in backend.weights().items()}


@pytest.mark.parametrize("weights", [lagging, narrow])
def test_replay_brings_trainer_and_engine_together(
    folder: Path, backend: FsdpBackend, weights: Callable[[FsdpBackend], dict[str, Tensor]]
) -> None:
    """An engine that lags, or computes in bfloat16: with its experts the largest difference of log-probs, which is a
    token that went elsewhere, falls to less than half, and the mean difference as well."""
    import asyncio
    import base64

    from miles.engine.protocol import GenerateRequest, SamplingParams

    engine = EmbeddedEngine(backend.model.config, weights(backend), None)
    asked = [
        GenerateRequest(
            input_ids=[2 + (7 * i + 3 * j) % 37 for j in range(10)],
            return_logprob=True,
            return_routed_experts=True,
            sampling_params=SamplingParams.from_payload({"max_new_tokens": 60, "sampling_seed": i, "ignore_eos": True}),
        )
        for i in range(24)
    ]

    async def generate() -> list[Any]:
        return list(await asyncio.gather(*(engine.generate(one) for one in asked)))

    results = asyncio.run(generate())
    engine.close()
    experts = [np.frombuffer(base64.b64decode(r.routed_experts), np.int32).reshape(-1, LAYERS, TOP_K) for r in results]
    batch = from_published_dict(
        {
            "tokens": [one.input_ids + r.output_ids for one, r in zip(asked, results)],
            "response_lengths": [len(r.output_ids) for r in results],
            "loss_masks": [[1] * len(r.output_ids) for r in results],
            "rollout_routed_experts": experts,
        }
    )
    engines = torch.tensor([x for r in results for x in r.output_logprobs])
    rows = [*range(len(asked))]
    free = (run(backend, batch, rows, None, share=True)[0] - engines).abs()
    tape = RoutingTape.of_engine(batch, backend.routing)
    replayed = (run(backend, batch, rows, tape, share=True)[0] - engines).abs()
    print(f"largest {free.max():.4f} -> {replayed.max():.4f}, mean {free.mean():.5f} -> {replayed.mean():.5f}")
    assert replayed.max() < 0.5 * free.max() and replayed.mean() < 0.9 * free.mean()


# ---- wrong input ---------------------------------------------------------------------------------------------------


def broken(change: Callable[[list[Any]], None]) -> TrainBatch:
    batch = make_batch(experts=True)
    assert batch.rollout_routed_experts is not None
    change(batch.rollout_routed_experts)
    return batch


def set_third(value: Any) -> Callable[[list[Any]], None]:
    return lambda rows: rows.__setitem__(2, value(rows[2]))


BAD = {
    "missing": (set_third(lambda e: None), "--use-rollout-routing-replay: sample 2 has no rollout_routed_experts"),
    "layers": (set_third(lambda e: e[:, :2]), r"has shape \(18, 2, 2\), expected \(18, 3, 2\)"),
    "short": (set_third(lambda e: e[1:]), r"has shape \(17, 3, 2\), expected \(18, 3, 2\)"),
    "experts": (set_third(lambda e: e + 5), r"names expert 12 .*expected numbers from 0 to 7"),
    "negative": (set_third(lambda e: e - 1), r"lowest -1\), expected numbers from 0 to 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_experts_name_the_sample(folder: Path, case: str) -> None:
    change, message = BAD[case]
    actor, _ = make_actor(folder, "--use-rollout-routing-replay")
    with pytest.raises(UsageError, match=message):
        actor.train(0, broken(change), 4)


def test_no_experts_at_all(folder: Path) -> None:
    actor, _ = make_actor(folder, "--use-rollout-routing-replay")
    with pytest.raises(UsageError, match="sample 0 has no rollout_routed_experts"):
        actor.train(0, make_batch(), 4)


@pytest.mark.parametrize("flag", ["--use-routing-replay", "--use-rollout-routing-replay"])
def test_a_dense_model_has_nothing_to_replay(tmp_path: Path, flag: str) -> None:
    Qwen3ForCausalLM(Qwen3Config(**NUMBERS)).save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match=f"{flag}: the model in .*dense has no experts"):
        make_actor(tmp_path / "dense", flag)
