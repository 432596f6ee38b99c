"""True on-policy: the trainer's forward pass is the engine's bit for bit, and its gradients are the usual ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_trainer import LAYERS, NUMBERS, make_actor, make_batch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from miles.batch import from_published_dict, pack
from miles.engine.embedded import EmbeddedEngine
from miles.engine.protocol import GenerateRequest, SamplingParams
from miles.errors import CheckpointError
from miles.loss import exact_logprobs
from miles.trainer.fsdp.backend import FsdpBackend

FLAG = "--true-on-policy-mode"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "mlp_only_layers": [1]}


def wide(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that are no multiples of anything that vectorises."""
    return config | {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 10, "intermediate_size": 77}


MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**NUMBERS, tie_word_embeddings=True)),
    "qwen3-odd": lambda: Qwen3ForCausalLM(Qwen3Config(**wide(NUMBERS))),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in NUMBERS.items() if k != "head_dim"})),
    "llama-yarn": lambda: LlamaForCausalLM(LlamaConfig(**NUMBERS, attention_bias=True, rope_scaling=YARN)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**NUMBERS, **EXPERTS, norm_topk_prob=True)),
    "qwen3-moe-free": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**NUMBERS, **EXPERTS, norm_topk_prob=False)),
}


def save(model: PreTrainedModel, folder: Path) -> Path:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    torch.manual_seed(1)
    yield save(MODELS[request.param](), tmp_path / request.param)


def log_probs(backend: FsdpBackend, batch: Any, rows: list[int], *, share: bool, temperature: float) -> Tensor:
    def read(micro: Any, out: Any) -> Tensor:
        return exact_logprobs.linear_log_probs(
            out.hidden[micro.predicting], out.head_weight, micro.targets, temperature=temperature, chunk_tokens=29
        ).log_probs

    [values] = backend.forward_only([pack(batch, rows, share_prompts=share)], read)
    return values


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoded_log_probs_are_those_of_a_training_pass(folder: Path, temperature: float) -> None:
    """Groups of one prompt, different lengths, few slots; trained packed, shared, alone and in other company."""
    backend = make_actor(folder, FLAG)[0].backend
    engine = EmbeddedEngine(backend.model.config, backend.weights(), None, exact=True, max_running_requests=5)
    asked = [
        GenerateRequest(
            input_ids=[2 + (7 * (i // 3) + 3 * j) % 37 for j in range(4 + 5 * (i // 3))],
            return_logprob=True,
            sampling_params=SamplingParams.from_payload(
                {"max_new_tokens": 5 + 6 * i, "temperature": temperature, "ignore_eos": True, "sampling_seed": i}
            ),
        )
        for i in range(12)
    ]

    async def generate() -> list[Any]:
        return list(await asyncio.gather(*(engine.generate(one) for one in asked)))

    results = asyncio.run(generate())
    engine.close()
    batch = from_published_dict(
        {
            "tokens": [one.input_ids + r.output_ids for one, r in zip(asked, results)],
            "response_lengths": [len(r.output_ids) for r in results],
            "loss_masks": [[1] * len(r.output_ids) for r in results],
        }
    )
    engines = torch.tensor([x for r in results for x in r.output_logprobs])
    everything = [*range(len(asked))]
    for share in (True, False):
        assert torch.equal(log_probs(backend, batch, everything, share=share, temperature=temperature), engines)
    offsets = batch.response_offsets
    for i in everything[::4]:
        alone = log_probs(backend, batch, [i], share=False, temperature=temperature)
        assert torch.equal(alone, engines[offsets[i] : offsets[i + 1]])


def test_gradients_are_those_of_the_ordinary_mode(folder: Path) -> None:
    grads, norms = [], []
    for flags in ((), (FLAG,), (FLAG, "--gradient-checkpointing")):
        actor, lines = make_actor(folder, "--lr", "0", "--entropy-coef", "0.01", "--micro-batch-size", "3", *flags)
        actor.train(0, make_batch(), 4)
        grads.append({name: p.grad for name, p in actor.backend.model.named_parameters()})
        norms.append([line["train/grad_norm"] for line in lines.steps])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and norms[0][0] > 0.01
    for name, usual in grads[0].items():
        torch.testing.assert_close(grads[1][name], usual, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(grads[2][name], grads[1][name], atol=1e-6, rtol=1e-5)


def test_the_forward_pass_is_close_to_hugging_face(folder: Path) -> None:
    backend, batch = make_actor(folder, FLAG)[0].backend, make_batch()
    got = log_probs(backend, batch, [0, 1], share=True, temperature=1.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for i in (0, 1):
        ids = torch.from_numpy(batch.tokens[batch.token_offsets[i] : batch.token_offsets[i + 1]])
        length = int(batch.response_lengths[i])
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, -length - 1 : -1].log_softmax(-1)
        expected.append(log_p.gather(1, ids[-length:, None]).squeeze(1))
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=0)


def test_routing_is_recorded_and_replayed_in_this_mode_too(tmp_path: Path) -> None:
    folder = save(MODELS["qwen3-moe"](), tmp_path / "model")
    actor, lines = make_actor(folder, FLAG, "--use-routing-replay", "--lr", "0.1")
    actor.train(0, make_batch(), 4)
    assert len(lines.steps) == 2 and actor.backend.routing.num_layers == LAYERS


def test_an_architecture_without_an_exact_engine_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="cannot run a GPT2LMHeadModel"):
        make_actor(tmp_path / "gpt2", FLAG)
