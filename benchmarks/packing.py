"""Packed training beside padding to the longest: tokens per second on a long-tailed mix of lengths.

    python benchmarks/packing.py [--samples 64] [--sigma 1.0] [--threads 2] [--rounds 3]

Both sides train the same 1M-parameter Qwen3 (hidden 128, 4 layers, vocabulary 2048, float32) on the same samples, whose
lengths are log-normal (median 128 tokens, at most 2048), the second half of each being its response: forward, backward,
one AdamW step, log-probs at response positions only. The padded side takes the samples in their order, eight at a
time, padded to the longest of the eight, with the model's own attention and a mask; the packed side is the fsdp backend
under `--use-dynamic-batch-size --max-tokens-per-gpu 4096`. The two take turns in one process; tokens are real ones,
never padding. The ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from tiny_model import VOCABULARY, write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from miles.batch import PackedBatch, TrainBatch, by_tokens, from_published_dict, pack
from miles.config import OptimizerConfig, TrainConfig
from miles.loss.logprobs import linear_log_probs
from miles.run.host import keep_freed_memory
from miles.trainer.backend import MicroLoss, ModelOutput
from miles.trainer.fsdp.backend import FsdpBackend

MEDIAN, LONGEST, PADDED_ROWS, BUDGET = 128, 2048, 8, 4096
GOAL = 1.5


def make_batch(samples: int, sigma: float) -> TrainBatch:
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(np.log(MEDIAN), sigma, samples)).astype(int).clip(4, LONGEST)
    responses = (lengths // 2).tolist()
    return from_published_dict(
        {
            "tokens": [random.integers(0, VOCABULARY, n).tolist() for n in lengths],
            "response_lengths": responses,
            "loss_masks": [[1] * n for n in responses],
        }
    )


class Packed:
    """The fsdp backend on packed micro batches."""

    def __init__(self, folder: str, batch: TrainBatch) -> None:
        self.batch = batch
        self.backend = FsdpBackend(folder, TrainConfig(), OptimizerConfig(lr=1e-4))

    def step(self) -> None:
        rows = np.arange(len(self.batch))
        micros = [pack(self.batch, part) for part in by_tokens(rows, self.batch.total_lengths, BUDGET)]
        self.backend.zero_grad()
        self.backend.forward_backward(micros, self._loss)
        self.backend.optimizer_step()

    def _loss(self, micro: PackedBatch, output: ModelOutput) -> MicroLoss:
        hidden = output.hidden.index_select(0, micro.predicting)
        log_probs = linear_log_probs(hidden, output.head_weight, micro.targets).log_probs
        return MicroLoss(-log_probs.sum() / len(self.batch.loss_masks), {})


class Padded:
    """The model as transformers runs it."""

    def __init__(self, folder: str, batch: TrainBatch) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.rows = torch.split(torch.from_numpy(batch.tokens), batch.total_lengths.tolist())
        self.responses = batch.response_lengths.tolist()
        self.trained = len(batch.loss_masks)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(self.rows), PADDED_ROWS):
            self._loss(self.rows[start : start + PADDED_ROWS], self.responses[start : start + PADDED_ROWS]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _loss(self, rows: tuple[Tensor, ...], responses: list[int]) -> Tensor:
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        places = torch.arange(tokens.shape[1])
        mask = places < lengths[:, None]
        out = self.model.base_model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
        responding = mask & (places >= (lengths - torch.tensor(responses))[:, None])
        hidden = out.last_hidden_state[:, :-1][responding[:, 1:]]
        weight = self.model.get_output_embeddings().weight
        return -linear_log_probs(hidden, weight, tokens[responding]).log_probs.sum() / self.trained


def seconds_of(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of the lengths")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as in a training process
    disable_progress_bar()
    batch = make_batch(given.samples, given.sigma)
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(folder, context=LONGEST)
        padded, packed = Padded(folder, batch), Packed(folder, batch)
    rounds = [(seconds_of(padded.step), seconds_of(packed.step)) for _ in range(given.rounds + 1)][1:]
    lengths, tokens = batch.total_lengths, len(batch.tokens)
    print(f"{len(batch)} samples, {tokens} tokens; lengths up to {lengths.max()}, mean {lengths.mean():.0f}")
    print(f"{'':<20}{'padded':>10}{'packed':>10}{'ratio':>8}{'goal':>9}")
    a, b = (tokens / median(r[side] for r in rounds) for side in (0, 1))
    ratio = median(padded_s / packed_s for padded_s, packed_s in rounds)
    print(f"{'tokens per second':<20}{a:>10.0f}{b:>10.0f}{ratio:>8.2f}{f'>= {GOAL}':>9}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
