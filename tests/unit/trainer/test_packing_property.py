"""Packed rows never see each other: a sample's log-probs and gradients are the same whoever stands beside it.

Rows of any lengths, some with an empty response, some of a single token, some with the prompt of another, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles.batch import PackedBatch, TrainBatch, from_published_dict, pack
from miles.config import OptimizerConfig, TrainConfig
from miles.loss.logprobs import linear_log_probs
from miles.trainer.backend import MicroLoss, ModelOutput
from miles.trainer.fsdp.backend import FsdpBackend

VOCABULARY = 23
PROMPTS = ([5], [7, 3], [2, 9, 4, 4])


@dataclass(frozen=True)
class Row:
    prompt: list[int]
    response: list[int]


tokens = st.integers(0, VOCABULARY - 1)
prompts = st.sampled_from(PROMPTS) | st.lists(tokens, min_size=1, max_size=5)
rows = st.builds(Row, prompts, st.lists(tokens, max_size=6) | st.lists(tokens, min_size=60, max_size=70))
ALONE, SILENT = Row([5], []), Row([7, 3], [])


@pytest.fixture(scope="module", params=[False, True], ids=["kept", "checkpointed"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FsdpBackend:
    """A random Qwen3 in double precision, so that 1e-10 tells rounding from attention to a neighbour."""
    folder = tmp_path_factory.mktemp("packing") / "model"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, intermediate_size=24, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    made = FsdpBackend(str(folder), TrainConfig(gradient_checkpointing=request.param), OptimizerConfig(lr=0.0))
    made.model.double()
    return made


def batch_of(given: list[Row]) -> TrainBatch:
    return from_published_dict(
        {
            "tokens": [row.prompt + row.response for row in given],
            "response_lengths": [len(row.response) for row in given],
            "loss_masks": [[1] * len(row.response) for row in given],
        }
    )


def of_sample(backend: FsdpBackend, given: list[Row], at: int, share: bool) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of the response of row `at`, and the gradient of a weighted sum of them."""
    found: list[Tensor] = []

    def loss_fn(micro: PackedBatch, output: ModelOutput) -> MicroLoss:
        hidden = output.hidden.index_select(0, micro.predicting)
        log_probs = linear_log_probs(hidden, output.head_weight, micro.targets, temperature=0.8).log_probs
        own = log_probs[micro.sample_ids == at]
        found.append(own.detach())
        weights = torch.linspace(1.0, 2.0, len(own), dtype=own.dtype)
        return MicroLoss((own * weights).sum() + 0.0 * log_probs.sum(), {})

    backend.zero_grad()
    micro = pack(batch_of(given), range(len(given)), share_prompts=share)
    backend.forward_backward([micro], loss_fn)
    return found[0], [torch.zeros_like(p) if p.grad is None else p.grad for p in backend.params]


@settings(max_examples=20, deadline=None)
@given(st.lists(rows, min_size=1, max_size=5), st.integers(0, 4), st.booleans())
@example([ALONE, Row([7, 3], [1, 2]), SILENT], 1, True)
@example([SILENT, Row([7, 3], [4]), Row([7, 3], [4, 5] * 35)], 1, True)
@example([ALONE, SILENT, ALONE], 1, False)
def test_neighbours_change_nothing(backend: FsdpBackend, given: list[Row], at: int, share: bool) -> None:
    at %= len(given)
    log_probs, grads = of_sample(backend, given, at, share)
    alone, alone_grads = of_sample(backend, [given[at]], 0, share=False)
    assert len(log_probs) == len(given[at].response)
    torch.testing.assert_close(log_probs, alone, atol=1e-10, rtol=0)
    for got, want in zip(grads, alone_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_the_layout_alone_decides_every_bit(backend: FsdpBackend) -> None:
    """Other tokens in the neighbouring rows, the same lengths: the same sample, bit for bit."""
    own = Row([2, 9, 4], [3, 8, 8, 1])
    results = []
    for token in (6, 11):
        neighbours = [Row([token] * 4, [token] * 9), Row([token], [])]
        results.append(of_sample(backend, [neighbours[0], own, neighbours[1]], 1, share=False))
    assert torch.equal(results[0][0], results[1][0])
    changed = [name for name, a, b in zip(dict(backend.model.named_parameters()), *(g for _, g in results), strict=True)
               if not torch.equal(a, b)]  # fmt: skip
    assert not changed
