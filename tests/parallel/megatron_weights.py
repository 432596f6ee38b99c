"""What each rank does in the tests of Megatron weights: `megatron_weights.py RANK SIZE FOLDER` runs every case.

A case builds a model with random weights, fills it from a folder that the tests made, and exports it again. Rank 0
and every other rank leave what came out as `<FOLDER>/<case> <SIZE> <RANK>.pt`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import torch
from megatron_models import FAMILIES, Split, build, logits, start
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miles.errors import CheckpointError
from miles.trainer.megatron.convert import Exporter, load_hf, local_parameters, read_hf

# Bytes: less than most matrices; a few tensors; everything.
BUCKETS = (600, 20_000, 1 << 30)


@dataclass(frozen=True)
class Case:
    """A folder of `FAMILIES` on a layout; both spellings of expert names."""

    family: str
    split: Split


CASES: dict[int, dict[str, Case]] = {
    1: {name: Case(name, Split()) for name in FAMILIES},
    2: {
        "tp2 llama": Case("llama", Split(tensor=2)),
        "tp2 qwen2": Case("qwen2", Split(tensor=2)),
        "tp2 moe": Case("moe", Split(tensor=2, expert_tensor=2, sequence=True)),
        "pp2 qwen3": Case("qwen3", Split(pipeline=2)),
        "pp2 tied": Case("qwen3 tied", Split(pipeline=2)),
        "pp2 moe and dense": Case("moe and dense", Split(pipeline=2)),
        "vpp2 qwen2": Case("qwen2", Split(pipeline=2, virtual=2)),
        "vpp2 tied": Case("llama tied", Split(pipeline=2, virtual=2)),
        "pp2 uneven": Case("qwen2", Split(pipeline=2, first_stage_layers=1)),
        "pp2 of one's own": Case("llama", Split(pipeline=2, stages="Ettt|tL")),
        "vpp2 of one's own": Case("moe and dense", Split(pipeline=2, virtual=2, stages="E|tt|t|tL")),
        "ep2 moe": Case("moe", Split(expert=2)),
        "dp2 llama": Case("llama", Split()),
    },
    4: {
        "tp4 fewer groups than ranks": Case("qwen2", Split(tensor=4)),
        "tp2 pp2 qwen3": Case("qwen3", Split(tensor=2, pipeline=2)),
        "tp2 vpp2 tied": Case("llama tied", Split(tensor=2, pipeline=2, virtual=2)),
        "tp2 pp2 ep2 moe": Case("moe", Split(tensor=2, pipeline=2, expert=2, sequence=True)),
        "tp2 ep2 moe and dense": Case("moe and dense", Split(tensor=2, expert=2, sequence=True)),
        "ep4 moe": Case("moe", Split(expert=4)),
        "tp2 dp2 qwen2": Case("qwen2", Split(tensor=2)),
        "tp2 pp2 moe": Case("moe", Split(tensor=2, pipeline=2, expert_tensor=2, sequence=True)),
        "tp2 ep2 etp2 moe": Case("moe", Split(tensor=2, expert=2, expert_tensor=2, sequence=True)),
        "tp4 ep2 etp2 moe": Case("moe", Split(tensor=4, expert=2, expert_tensor=2, sequence=True)),
        "ep2 dp2 moe": Case("moe", Split(expert=2)),
        "tp2 cp2 llama": Case("llama", Split(tensor=2, context=2)),
    },
}
BAD = ("missing", "extra", "shape", "many", "torn", "no weights", "no config", "unknown", "lost shard", "bad index")
# Both ranks of a group must refuse a folder, for what only one of them would have read.
BAD_OF_TWO = ("missing", "shape")


def run(case: Case, folder: Path) -> dict[str, Any]:
    chunks, config = build(folder / case.family, case.split)
    before = {name: p.detach().clone() for name, p in local_parameters(chunks).items()}
    read = read_hf(folder / case.family, chunks, config)
    untouched = all(torch.equal(p, before[name]) for name, p in local_parameters(chunks).items())
    load_hf(folder / case.family, chunks, config)
    loaded = local_parameters(chunks)
    found: dict[str, Any] = {
        "untouched": untouched,
        "read is loaded": read.keys() == loaded.keys() and all(torch.equal(read[n], p) for n, p in loaded.items()),
        "padding": [p[-1].abs().sum().item() for n, p in loaded.items() if "embedding" in n or "output" in n],
    }
    for experts in ("each", "stacked"):
        exporter = Exporter(folder / case.family, chunks, config, experts=experts)
        found[f"layout {experts}"] = exporter.layout()
        for size in BUCKETS:
            buckets = list(exporter.buckets(size))
            found[f"{experts} {size}"] = [{n: t.detach().clone() for n, t in bucket.items()} for bucket in buckets]
    if case.split == Split():
        found["logits"] = logits(chunks[0], FAMILIES[case.family].vocab_size)
    return found


def refused(folder: Path, source: Path) -> str:
    """What is said of a bad folder by a model that was made for a good one."""
    chunks, config = build(folder / "qwen2", Split(tensor=torch.distributed.get_world_size()))
    before = {name: p.detach().clone() for name, p in local_parameters(chunks).items()}
    try:
        load_hf(source, chunks, config, flag="--ref-load")
    except CheckpointError as error:
        assert all(torch.equal(p, before[name]) for name, p in local_parameters(chunks).items())
        return str(error)
    return "nothing was said"


def with_own_head(folder: Path) -> dict[str, Any]:
    """A critic: one output of its own, with a bias."""
    chunks, config = build(folder / "qwen2", Split())
    head = nn.Linear(32, 1)
    chunks[0].output_layer = head
    before = [p.detach().clone() for p in head.parameters()]
    load_hf(folder / "qwen2", chunks, config, own_head=True)
    exporter = Exporter(folder / "qwen2", chunks, config, own_head=True)
    kept = all(torch.equal(p, q) for p, q in zip(head.parameters(), before))
    names = [name for bucket in exporter.buckets(1 << 30) for name in bucket]
    return {"kept": kept, "names": names, "read": list(read_hf(folder / "qwen2", chunks, config, own_head=True))}


class Peak(TorchDispatchMode):
    """The most bytes that were alive at a time, of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[ReferenceType[Tensor]] = []
        self.apart: set[int] = set()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen = [ref(t) for t in (r() for r in self.seen) if t is not None]
        self.seen += [ref(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        storages = {}
        for reference in self.seen:
            storage = reference().untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        self.bytes = max(self.bytes, sum(n for at, n in storages.items() if at not in self.apart))
        return out


def memory(folder: Path) -> dict[str, Any]:
    """Peaks of this rank, per size of the buckets."""
    found: dict[str, Any] = {}
    for family, split in (("qwen3", Split(tensor=2, pipeline=2)), ("moe", Split(tensor=2, expert=2, sequence=True))):
        chunks, config = build(folder / family, split)
        exporter = Exporter(folder / family, chunks, config, experts="stacked")
        for size in (4_000, 20_000):
            with Peak() as peak:
                peak.apart = {p.untyped_storage().data_ptr() for p in chunks[0].parameters()}
                for bucket in exporter.buckets(size):
                    bucket.clear()
            found[f"{family} {size}"] = peak.bytes
    return found


class Wrapper(nn.Module):
    """As data parallelism and mixed precision wrap a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def wrapped_in_bfloat16(folder: Path) -> dict[str, Any]:
    chunks, config = build(folder / "llama", Split())
    chunks = [Wrapper(Wrapper(chunk.bfloat16())) for chunk in chunks]
    load_hf(folder / "llama", chunks, config)
    exporter = Exporter(folder / "llama", chunks, config)
    buckets = [dict(bucket) for bucket in exporter.buckets(1 << 30)]
    storages = {p.untyped_storage().data_ptr() for p in chunks[0].parameters()}
    copied = [n for b in buckets for n, t in b.items() if t.untyped_storage().data_ptr() not in storages]
    return {"layout": exporter.layout(), "buckets": buckets, "copied": copied}


def otherwise_stored(folder: Path) -> dict[str, Any]:
    """The same weights with stacked experts on the disk, and in several files with an index."""
    found = {}
    for source, family in (("moe stacked", "moe"), ("qwen2 sharded", "qwen2")):
        loaded = []
        for path in (folder / source, folder / family):
            chunks, config = build(folder / family, Split())
            load_hf(path, chunks, config)
            loaded.append(local_parameters(chunks))
        found[source] = [n for n, p in loaded[0].items() if not torch.equal(p, loaded[1][n])]
    return found


class Spelled(nn.Module):
    """A model whose parameters have the names that TransformerEngine's modules would give them."""

    def __init__(self, chunk: nn.Module) -> None:
        super().__init__()
        self.vocab_size = chunk.vocab_size
        self.named = {_spelled(name): parameter for name, parameter in chunk.named_parameters()}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.named.items()


def _spelled(name: str) -> str:
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    return re.sub(r"experts\.local_experts\.(\d+)\.linear_fc(\d)\.weight", r"experts.linear_fc\2.weight\1", name)


def other_spelling(folder: Path) -> dict[str, Any]:
    """Filled and exported under other names: parameters that differ from those of the plain model; their names."""
    chunks, config = build(folder / "moe and dense", Split())
    spelled = Spelled(chunks[0])
    load_hf(folder / "moe and dense", [spelled], config)
    exporter = Exporter(folder / "moe and dense", [spelled], config, experts="each")
    exported = {n: t.clone() for bucket in exporter.buckets(1 << 30) for n, t in bucket.items()}
    plain, _ = build(folder / "moe and dense", Split())
    load_hf(folder / "moe and dense", plain, config)
    wrong = [n for (n, p), q in zip(spelled.named_parameters(), plain[0].parameters()) if not torch.equal(p, q)]
    return {"wrong": wrong, "names": list(spelled.named), "exported": exported}


def main(rank: int, size: int, folder: Path) -> None:
    start(rank, size, folder / f"store {size}")
    for name, case in CASES[size].items():
        torch.save(run(case, folder), folder / f"{name} {size} {rank}.pt")
    if size == 1:
        torch.save(with_own_head(folder), folder / "own head.pt")
        torch.save(wrapped_in_bfloat16(folder), folder / "bfloat16.pt")
        torch.save(otherwise_stored(folder), folder / "stored.pt")
        torch.save(other_spelling(folder), folder / "spelled.pt")
    if size == 4:
        torch.save(memory(folder), folder / f"memory {rank}.pt")
    if size < 4:
        bad = BAD if size == 1 else BAD_OF_TWO
        torch.save({n: refused(folder, folder / f"bad {n}") for n in bad}, folder / f"refused {size} {rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
