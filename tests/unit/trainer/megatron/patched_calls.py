"""The smallest calls of Megatron-Core on a CPU that need a row of the tables in `cpu`, without the row and with it.

`patched_calls.py FOLDER` leaves `<FOLDER>/calls.json`: row -> what went wrong without the row, and what with it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles.batch import PackedBatch, from_published_dict, pack
from miles.config import parse
from miles.trainer.backend import MicroLoss, ModelOutput
from miles.trainer.megatron import cpu

# After `cpu`, which patches what these import.
from megatron.core import parallel_state as mpu  # isort: skip
from megatron.core import tensor_parallel  # isort: skip
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank  # isort: skip
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed  # isort: skip
from miles.trainer.megatron.backend import MegatronBackend  # isort: skip
from miles.trainer.megatron.ranks import make_groups  # isort: skip
from miles.trainer.megatron.settings import MegatronSettings  # isort: skip
from miles.trainer.ranks import Ranks  # isort: skip

SHAPE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "tie_word_embeddings": True,
    "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DENSE, MOE = "dense", "moe"
PP = ("--pipeline-model-parallel-size", "2")
EP = ("--expert-model-parallel-size", "2")


def make_models(folder: Path) -> None:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(folder / DENSE)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)).save_pretrained(folder / MOE)


class Calls:
    """Each method is one call; it raises where something went wrong."""

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder

    # ---- random numbers

    def seeded(self) -> None:
        """A seed decides what is drawn."""
        self._groups()
        drawn = []
        for seed in (3, 4, 3):
            torch.manual_seed(0)
            model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
            drawn.append(torch.rand(4))
        assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1]), "the seed has no effect"

    def forked(self) -> None:
        """Numbers that are drawn apart leave those of everybody else as they are."""
        self._groups()
        drawn = []
        for number in range(3):
            model_parallel_cuda_manual_seed(3, force_reset_rng=True)
            if number:
                with get_cuda_rng_tracker().fork():
                    torch.rand(number)
            drawn.append(torch.rand(4))
        assert all(torch.equal(drawn[0], other) for other in drawn), "what was drawn apart has changed the rest"

    def recomputed(self) -> None:
        self._groups()
        x = torch.ones(3, requires_grad=True)
        tensor_parallel.checkpoint(torch.exp, False, x).sum().backward()
        assert x.grad is not None

    # ---- models

    def built(self) -> None:
        self._backend(DENSE)

    def stepped(self) -> None:
        self._train(self._backend(DENSE))

    def staged(self) -> None:
        """Two stages that share the embedding."""
        self._train(self._backend(DENSE, *PP))

    def routed(self) -> None:
        self._train(self._backend(MOE))

    def divided(self) -> None:
        """Experts on two ranks."""
        self._train(self._backend(MOE, *EP))

    def positioned(self) -> None:
        """Megatron's own rotary positions under context parallelism, which a model of the user's own may have."""
        self._groups()
        angles = get_pos_emb_on_this_cp_rank(torch.arange(4.0)[:, None], 0, mpu.get_context_parallel_group())
        assert angles.flatten().tolist() == [0, 1, 2, 3]

    def saved(self) -> None:
        backend = self._backend(DENSE)
        backend.save(Path(tempfile.mkdtemp(dir=self.folder)), with_optimizer=False)
        backend.finish_saving()

    def _config(self, model: str, *flags: str) -> Any:
        return parse(
            [
                *("--hf-checkpoint", str(self.folder / model), "--prompt-data", "x.jsonl", "--num-rollout", "1"),
                *("--rollout-batch-size", "2", "--global-batch-size", "2", "--rm-type", "math", *flags),
                *("--train-backend", "megatron", "--lr", "1e-3"),
                *("--actor-num-gpus-per-node", str(self.ranks.size)),
            ]
        )[0]

    def _groups(self, model: str = DENSE, *flags: str) -> tuple[Any, Ranks]:
        config = self._config(model, *flags)
        return config, make_groups(self.ranks, config.layout, seed=1, timeout_minutes=1)

    def _backend(self, model: str, *flags: str) -> MegatronBackend:
        config, own = self._groups(model, *flags)
        return MegatronBackend(MegatronSettings.of(config), config.optimizer, own)

    def _train(self, backend: MegatronBackend) -> None:
        def loss(micro: PackedBatch, output: ModelOutput) -> MicroLoss:
            found = output.log_probs(micro, temperature=1.0, with_entropy=False, chunk_tokens=None)
            return MicroLoss(-found.log_probs.sum(), {})

        rows = from_published_dict(
            {
                "tokens": [[4, 5, 6, 7, 8], [9, 8, 7]], "response_lengths": [3, 1], "rewards": [0.0] * 2,
                "raw_reward": [0.0] * 2, "truncated": [0] * 2, "sample_indices": [0, 1], "loss_masks": [[1] * 3, [1]],
            }
        )  # fmt: skip
        backend.zero_grad()
        backend.forward_backward([pack(rows, [0, 1])], loss)
        assert backend.optimizer_step().grad_norm > 0


@dataclass(frozen=True)
class Call:
    function: Callable[[Calls], None]
    ranks: int = 1


NEEDED_BY: dict[str, Call] = {
    "torch.cuda.current_device": Call(Calls.built),
    "torch.cuda.synchronize": Call(Calls.saved),
    "torch.cuda.current_stream": Call(Calls.routed),
    "torch.cuda.Stream": Call(Calls.routed),
    "torch.cuda.get_rng_state": Call(Calls.seeded),
    "torch.cuda.random.get_rng_state": Call(Calls.recomputed),
    "torch.cuda.manual_seed": Call(Calls.seeded),
    "torch.tensor": Call(Calls.stepped),
    "torch.tensor, in pinned memory": Call(Calls.positioned),
    "torch.zeros": Call(Calls.stepped),
    "Tensor.cuda": Call(Calls.staged, ranks=2),
    "Tensor.type": Call(Calls.built),
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": Call(Calls.divided, ranks=2),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": Call(Calls.forked),
    "megatron.core.transformer.moe.moe_utils.te_general_gemm": Call(Calls.routed),
}


@contextmanager
def without(patch: cpu.Patch) -> Iterator[None]:
    patched = getattr(patch.owner, patch.name)
    setattr(patch.owner, patch.name, cpu._replaced[patch])
    try:
        yield
    finally:
        setattr(patch.owner, patch.name, patched)


@contextmanager
def with_gap(module: str, name: str) -> Iterator[None]:
    owner = importlib.import_module(module)
    filled = getattr(owner, name)
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, filled)


def rows() -> dict[str, Any]:
    """Name -> a context in which the row is undone."""
    made = {str(patch): without(patch) for patch in cpu.PATCHES}
    made |= {name: without(patch) for name in NEEDED_BY for patch in cpu.PATCHES if name.startswith(f"{patch}, ")}
    for module, name, make in cpu.IN_MEGATRON:
        made[f"{module}.{name}"] = without(cpu.Patch(importlib.import_module(module), name, make))
    return made | {f"{module}.{name}": with_gap(module, name) for module, name in cpu.GAPS}


# ---- processes of a moment -------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")
TIMEOUT_S = 60.0


def outcome(call: Call, folder: Path) -> list[str]:
    """What went wrong on the ranks that make the call, each a child of this process that nothing has used before."""
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    ends = [FORK.Pipe(duplex=False) for _ in range(call.ranks)]
    children = [
        FORK.Process(target=attempt, args=(call, rank, folder, store, end)) for rank, (_, end) in enumerate(ends)
    ]
    for child in children:
        child.start()
    found = []
    for child, (told, _) in zip(children, ends, strict=True):
        found.append(told.recv() if told.poll(TIMEOUT_S) else "it did not come back")
        child.join(TIMEOUT_S)
        child.kill()
    return [text for text in found if text is not None]


def attempt(call: Call, rank: int, folder: Path, store: Path, told: Any) -> None:
    try:
        ranks = Ranks.join(
            rank, call.ranks, store, backend="gloo", cpu_backend="gloo", timeout_s=TIMEOUT_S / 2, device="cpu"
        )
        call.function(Calls(ranks, folder))
    except Exception as error:
        told.send(f"{type(error).__name__}: {error}")
    else:
        told.send(None)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    make_models(folder)
    found = {}
    for row, undone in rows().items():
        call = NEEDED_BY.get(row)
        if call is not None:
            with undone:
                lacking = outcome(call, folder)
            found[row] = (lacking, outcome(call, folder))
        else:
            found[row] = ([], ["nothing needs it"])
    (folder / "calls.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
