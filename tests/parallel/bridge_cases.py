"""Trainings with `--megatron-to-hf-mode bridge` beside the same with raw: a table of cases, the program of a rank.

`bridge_cases.py RANK SIZE FOLDER` trains every case of its size in both modes, with the library's miniature in the
place of Megatron-Bridge; rank 0 leaves `<FOLDER>/<case> <mode>.pt`, and `<FOLDER>/<case> <mode>/` as exported.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron_cases import MEGATRON, PADDED, PPO, batch_of, ep, pp, tp, whole, without_backend
from megatron_models import make_folder
from parallel_cases import FLAGS, ONE_BY_ONE, REFERENCE, STEPS, Lines, Trace

from miles.batch import split_batch
from miles.config import RunConfig, parse
from miles.errors import UsageError
from miles.hooks import bind
from miles.observe.tracking import Tracker
from miles.trainer.models import Models
from miles.trainer.ranks import Ranks
from miles.trainer.schedule import schedule_of

MODES = ("raw", "bridge")
# Bytes of a bucket: less than a stacked tensor of experts, more than most others.
BUCKET = 9000
KL = ("--use-kl-loss", "--kl-loss-coef", "0.1", *REFERENCE)
TOKENIZER = Path(__file__).parents[2] / "examples/quickstart/base/tokenizer.json"
# Without it a bridge starts from --ref-load.
FROM_MODEL = ("--load", "{model}")
PROVIDER = ("--custom-model-provider-path", str(Path(__file__).parents[1] / "published/plug_ins/megatron_provider.py"))


@dataclass(frozen=True)
class Case:
    """`starts_from_reference`: the raw run gets the reference as its model."""

    size: int = 1
    model: str = "qwen3"
    flags: tuple[str, ...] = ()
    starts_from_reference: bool = False


CASES: dict[str, Case] = {
    "dense": Case(),
    "tied": Case(model="llama tied"),
    "biases": Case(model="qwen2"),
    "moe": Case(model="moe and dense"),
    "padded rows": Case(flags=PADDED),
    "kl": Case(flags=(*KL, *FROM_MODEL)),
    "from the reference": Case(flags=KL, starts_from_reference=True),
    "ppo": Case(model="llama tied", flags=(*PPO, *FROM_MODEL)),
    "provider": Case(model="qwen3 tied", flags=(PROVIDER[0], f"{PROVIDER[1]}:model_provider")),
    "sp": Case(2, flags=tp(2, sequence=True)),
    "pp tied": Case(2, "qwen3 tied", pp(2)),
    "vpp": Case(2, flags=pp(2, 2)),
    "pp ppo": Case(2, "llama tied", (*pp(2), *PPO, *FROM_MODEL)),
    "ep": Case(2, "moe", ep(2)),
}


def settings_of(case: Case, mode: str, folder: Path) -> tuple[RunConfig, Any]:
    model, reference = folder / case.model, folder / f"{case.model} reference"
    flags = [word.format(model=model, reference=reference) for word in case.flags]
    if mode == "raw" and case.starts_from_reference:
        model = reference
    place = ("--hf-checkpoint", str(model), "--actor-num-gpus-per-node", str(case.size))
    more = ("--megatron-to-hf-mode", mode)
    return parse([*without_backend(FLAGS), *MEGATRON, *ONE_BY_ONE, *place, *flags, *more])


def run(case: Case, mode: str, folder: Path, ranks: Ranks, exported: Path) -> dict[str, Any]:
    from bridge_library import AutoBridge

    config, args = settings_of(case, mode, folder)
    trace, hooks = Trace(), bind(args)
    AutoBridge.CALLS.clear()
    models = Models(config, args, hooks, ranks)
    actor = models.trainer(
        args, hooks, Tracker(sinks=[Lines(trace)]), schedule_of(config.optimizer, STEPS), transport=None,
        on_step=lambda: None,
    )  # fmt: skip
    actor.train_shards(0, split_batch(batch_of(config), config.layout.dp_size, balance=False), 8)
    backend: Any = actor.backend
    before = backend.snapshot()
    read = backend.read_snapshot(folder / f"{case.model} reference", flag="--ref-load")
    after = backend.snapshot()
    buckets = [list(bucket) for bucket in backend.weights().buckets(BUCKET)]
    backend.export_hf(exported)
    with backend.using(read):
        reference = whole(backend)
    return {
        "steps": trace.steps,
        "rollout": trace.rollout,
        "weights": whole(backend),
        "reference": reference,
        "layout": dict(backend.weights().layout()),
        "buckets": buckets,
        "is as before": all(torch.equal(before[name], after[name]) for name in before),
        "calls": list(AutoBridge.CALLS),
        "model": type(backend.config).__name__,
    }


def from_checkpoint(folder: Path, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The first weights of a run whose --ref-load is a checkpoint of Megatron's."""
    from megatron.core import parallel_state as mpu

    case = CASES["from the reference"]
    config, args = settings_of(case, "raw", folder)
    backend: Any = Models(config, args, bind(args), ranks).actor
    (folder / "saved").mkdir()
    backend.write_snapshot(backend.snapshot(), folder / "saved")
    mpu.destroy_model_parallel()
    flags = [word.replace("{reference}", str(folder / "saved")) for word in case.flags]
    config, args = settings_of(replace(case, flags=tuple(flags)), "bridge", folder)
    return whole(Models(config, args, bind(args), ranks).actor)


def refusals(folder: Path, ranks: Ranks) -> list[str]:
    """What users are told of folders of another model, and of a library that leaves out a tensor."""
    from bridge_library import AutoBridge

    config, args = settings_of(CASES["dense"], "bridge", folder)
    backend: Any = Models(config, args, bind(args), ranks).actor
    texts = []
    own = AutoBridge.export_hf_weights

    def short(self: AutoBridge, *args: Any, **kwargs: Any) -> Any:
        return (pair for pair in own(self, *args, **kwargs) if pair.param_name != "model.norm.weight")

    try:
        backend.read_snapshot(folder / "qwen2", flag="--ref-load")
    except UsageError as error:
        texts.append(str(error))
    AutoBridge.export_hf_weights = short  # type: ignore[method-assign]
    try:
        list(backend.weights().buckets(BUCKET))
    except UsageError as error:
        texts.append(str(error))
    AutoBridge.export_hf_weights = own  # type: ignore[method-assign]
    return texts


def make_models(folder: Path) -> None:
    for model in {case.model for case in CASES.values()}:
        make_folder(folder / model, model)
        make_folder(folder / f"{model} reference", model, seed=1)
        for given in (folder / model, folder / f"{model} reference"):  # exports have one
            shutil.copy(TOKENIZER, given)


def main(rank: int, size: int, folder: Path, names: list[str]) -> None:
    import bridge_library
    from megatron.core import parallel_state as mpu

    bridge_library.install()
    torch.set_num_threads(1)
    ranks = Ranks.join(
        rank, size, folder / f"store{size}", backend="gloo", cpu_backend="gloo", timeout_s=60, device="cpu"
    )
    for name in names or [name for name, case in CASES.items() if case.size == size]:
        for mode in MODES:
            traced = run(CASES[name], mode, folder, ranks, folder / f"{name} {mode}")
            if rank == 0:
                torch.save(traced, folder / f"{name} {mode}.pt")
            else:
                assert not any(traced["buckets"]), "whole tensors are for rank 0 alone"
            mpu.destroy_model_parallel()
    if size == 1:
        torch.save(refusals(folder, ranks), folder / "refusals.pt")
        mpu.destroy_model_parallel()
        torch.save(from_checkpoint(folder, ranks), folder / "from a checkpoint.pt")
    ranks.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
