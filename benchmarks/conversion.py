"""From samples to packed micro batches beside code of lists and loops: seconds per rollout.

    python benchmarks/conversion.py [--samples 256] [--tokens 4096] [--threads 1] [--rounds 5]

Both sides take the same finished samples (Python lists of token ids, loss masks and log-probs, as a rollout leaves
them: three quarters of each are its response) through conversion to columns, the split over two data-parallel ranks,
and packing into micro batches of at most 32,768 tokens as tensors. The list side is the straightforward way: a dict of
lists of lists, a copy of the rows of each rank, and one tensor per row and column, joined at the end. Both give the
same tensors, which is checked before anything is timed. The two take turns in one process, with the allocator of a
training process; each side's figure is its best round.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.batch import by_tokens, default_rewards, pack, split_batch, to_train_batch
from miles.run.host import keep_freed_memory
from miles.types import Sample

RANKS, BUDGET, GROUP, VOCABULARY = 2, 32_768, 8, 32_000
GOAL = 0.1


def make_samples(count: int, tokens: int) -> list[Sample]:
    generator = random.Random(0)
    samples = []
    for i in range(count):
        response = tokens * 3 // 4
        samples.append(
            Sample(
                index=i,
                group_index=i // GROUP,
                tokens=[generator.randrange(VOCABULARY) for _ in range(tokens)],
                response_length=response,
                loss_mask=[int(generator.random() < 0.9) for _ in range(response)],
                rollout_log_probs=[-generator.random() for _ in range(response)],
                reward=float(i % 3 == 0),
                status=Sample.Status.COMPLETED,
            )
        )
    return samples


Micro = dict[str, Tensor]


def flat_side(samples: list[Sample]) -> list[list[Micro]]:
    """What a run does: `miles.batch`."""
    raw, rewards = default_rewards(
        samples,
        reward_key=None,
        estimator="grpo",
        normalization=True,
        std_normalization=True,
        n_samples_per_prompt=GROUP,
    )
    ranks = []
    for shard in split_batch(to_train_batch(samples, raw, rewards), RANKS, balance=False):
        columns = shard.flat_columns()
        assert isinstance(shard.rewards, np.ndarray)
        micros = []
        for part in by_tokens(np.arange(len(shard)), shard.total_lengths, BUDGET):
            micro = pack(shard, part)
            micros.append(
                {
                    "tokens": micro.tokens,
                    "position_ids": micro.position_ids,
                    "cu_seqlens": micro.cu_seqlens,
                    "predicting": micro.predicting,
                    "targets": micro.targets,
                    "loss_mask": micro.loss_mask,
                    "rollout_log_probs": micro.column(columns["rollout_log_probs"]),
                    "rewards": torch.from_numpy(shard.rewards[part]),
                }
            )
        ranks.append(micros)
    return ranks


def list_side(samples: list[Sample]) -> list[list[Micro]]:
    """The same with lists, loops and one tensor per row."""
    data = converted(samples)
    ranks = []
    for rank in range(RANKS):
        shard = {key: [column[i] for i in range(rank, len(samples), RANKS)] for key, column in data.items()}
        ranks.append([packed(shard, rows) for rows in cut([len(row) for row in shard["tokens"]])])
    return ranks


def converted(samples: list[Sample]) -> dict[str, list[Any]]:
    data: dict[str, list[Any]] = {
        "tokens": [],
        "response_lengths": [],
        "loss_masks": [],
        "rollout_log_probs": [],
        "rewards": normalized([sample.reward for sample in samples]),
    }
    for sample in samples:
        mask = sample.loss_mask if sample.loss_mask is not None else [1] * sample.response_length
        log_probs = sample.rollout_log_probs or []
        assert len(mask) == len(log_probs) == sample.response_length
        data["tokens"].append(sample.tokens)
        data["response_lengths"].append(sample.response_length)
        data["loss_masks"].append(mask)
        data["rollout_log_probs"].append(log_probs)
    return data


def normalized(rewards: list[Any]) -> list[float]:
    result: list[float] = []
    for start in range(0, len(rewards), GROUP):
        group = torch.tensor(rewards[start : start + GROUP], dtype=torch.float64)
        result += ((group - group.mean()) / (group.std() + 1e-6)).tolist()
    return result


def cut(lengths: list[int]) -> list[list[int]]:
    """Rows in order of length, until the next would exceed the budget."""
    parts: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[row] > room or not parts:
            parts.append([])
            room = BUDGET
        parts[-1].append(row)
        room -= lengths[row]
    return parts


def packed(shard: dict[str, list[Any]], rows: list[int]) -> Micro:
    tokens, positions, predicting, targets, masks, log_probs = [], [], [], [], [], []
    cu_seqlens = [0]
    for row in rows:
        ids, response = shard["tokens"][row], shard["response_lengths"][row]
        start, prompt = cu_seqlens[-1], len(ids) - response
        tokens.append(torch.tensor(ids))
        positions.append(torch.tensor(list(range(len(ids)))))
        predicting.append(torch.tensor([start + t - 1 for t in range(prompt, len(ids))]))
        targets.append(torch.tensor(ids[prompt:]))
        masks.append(torch.tensor(shard["loss_masks"][row], dtype=torch.int32))
        log_probs.append(torch.tensor(shard["rollout_log_probs"][row]))
        cu_seqlens.append(start + len(ids))
    return {
        "tokens": torch.cat(tokens),
        "position_ids": torch.cat(positions),
        "cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32),
        "predicting": torch.cat(predicting),
        "targets": torch.cat(targets),
        "loss_mask": torch.cat(masks),
        "rollout_log_probs": torch.cat(log_probs),
        "rewards": torch.tensor([shard["rewards"][row] for row in rows]),
    }


def same(a: list[list[Micro]], b: list[list[Micro]]) -> bool:
    return [len(micros) for micros in a] == [len(micros) for micros in b] and all(
        torch.equal(x[key], y[key]) if key != "rewards" else torch.allclose(x[key], y[key])
        for micros_a, micros_b in zip(a, b)
        for x, y in zip(micros_a, micros_b)
        for key in x
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as in a training process
    samples = make_samples(given.samples, given.tokens)
    assert same(flat_side(samples), list_side(samples)), "the two sides must give the same tensors"
    rounds = []
    for _ in range(given.rounds):
        begin = time.perf_counter()
        list_side(samples)
        middle = time.perf_counter()
        flat_side(samples)
        rounds.append((middle - begin, time.perf_counter() - middle))
    lists, flat = (min(r[side] for r in rounds) for side in (0, 1))
    print(f"{given.samples} samples of {given.tokens} tokens, {RANKS} ranks")
    print(f"{'':<34}{'lists':>10}{'miles':>10}{'ratio':>8}{'goal':>9}")
    figures = f"{lists * 1e3:>10.0f}{flat * 1e3:>10.0f}{flat / lists:>8.3f}{f'<= {GOAL}':>9}"
    print(f"{'conversion, split, packing (ms)':<34}{figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
