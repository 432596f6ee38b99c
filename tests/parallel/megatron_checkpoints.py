"""What each rank does in the tests of Megatron checkpoints: `megatron_checkpoints.py RANK SIZE FOLDER`.

In a *case* one layout saves what another one loads. Weights, moments and masters are codes: their values say of which
tensor of the Hugging Face folder, and of which place in it, they are. What is loaded is held against what the
converter of Hugging Face weights puts there, which knows nothing of checkpoints. Problems are left as text.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron_models import FAMILIES, forget
from parallel_cases import rollout
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from miles.batch import split_batch
from miles.config import RunConfig, parse
from miles.hooks import bind
from miles.observe.tracking import Tracker
from miles.trainer.actor import Restoring, TrainActor
from miles.trainer.ranks import Ranks
from miles.trainer.schedule import Schedule

FLAGS = [
    "--num-rollout", "1", "--prompt-data", "x.jsonl", "--rollout-batch-size", "6", "--n-samples-per-prompt", "4",
    "--num-steps-per-rollout", "3", "--rm-type", "math", "--train-backend", "megatron", "--lr", "5e-3",
    "--clip-grad", "0.5", "--adam-eps", "1e-4", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "120",
]  # fmt: skip

LAYOUTS: dict[str, list[str]] = {
    "whole": [],
    "tp2": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "tp4": ["--tensor-model-parallel-size", "4"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "vpp2": ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
    "tp2 pp2": [
        *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"), "--sequence-parallel",
    ],
    "ep4": ["--expert-model-parallel-size", "4"],
    "ep2 pp2": ["--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
    "tp2 ep2": ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"],
}  # fmt: skip
"""What is left of the ranks is data parallelism, over which the optimizer is divided by default."""

PLAIN = ("--no-use-distributed-optimizer",)
BF16 = ("--bf16",)
PADDED = ("--make-vocab-size-divisible-by", "24")

HALF = 1 / 1024
"""Added to masters, where it is exact, and lost in bfloat16."""


@dataclass(frozen=True)
class Case:
    """`flags` hold for both sides."""

    family: str
    saved: str
    loaded: str
    flags: tuple[str, ...] = ()
    role: str = "actor"
    steps: int = 7
    background: bool = False


CASES: dict[int, dict[str, Case]] = {
    1: {
        "alone": Case("qwen3", "whole", "whole"),
        "alone untrained": Case("qwen3", "whole", "whole", steps=0),
        "alone plain untrained": Case("qwen3", "whole", "whole", PLAIN, steps=0),
    },
    4: {
        "to tp2 pp2": Case("qwen3", "whole", "tp2 pp2"),
        "from tp2 pp2": Case("qwen3", "tp2 pp2", "whole", background=True),
        "tied to stages": Case("llama tied", "tp4", "vpp2"),
        "tied from stages": Case("llama tied", "vpp2", "tp2 pp2"),
        "padded vocabulary": Case("qwen2", "tp4", "whole", PADDED),
        "plain from vpp2": Case("llama tied", "vpp2", "tp2", PLAIN, background=True),
        "bf16": Case("qwen3", "whole", "tp2 pp2", BF16),
        "bf16 plain": Case("qwen3", "pp2", "tp2", (*BF16, *PLAIN)),
        "experts to ep4": Case("moe", "whole", "ep4"),
        "experts from tp2 ep2": Case("moe", "tp2 ep2", "ep2 pp2"),
        "experts in one stage": Case("dense first", "pp2", "tp2 ep2"),
        "critic tied": Case("llama tied", "whole", "vpp2", role="critic"),
    },
}

MODELS: dict[str, PretrainedConfig] = {
    **FAMILIES,
    "two layers": Qwen3Config(**{**FAMILIES["qwen3"].to_dict(), "num_hidden_layers": 2, "layer_types": None}),
    "dense first": Qwen3MoeConfig(**{**FAMILIES["moe"].to_dict(), "mlp_only_layers": [0, 1]}),
}


# ---- before the ranks ----------------------------------------------------------------------------------------------


def make_folders(folder: Path) -> None:
    """A random model of each architecture, and its codes."""
    for name, config in MODELS.items():
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.8 if parameter.dim() == 1 else 0.0, 0.2)
        model.save_pretrained(folder / name)
        for kind in ("codes", "small"):
            model.save_pretrained(folder / f"{name} {kind}")
            file = folder / f"{name} {kind}" / "model.safetensors"
            save_file(coded(load_file(file), exact=kind == "codes"), file)


def coded(tensors: dict[str, Tensor], *, exact: bool) -> dict[str, Tensor]:
    """No value twice in the whole model; or, in what bfloat16 can hold, 0 .. 255 in an order of each tensor's own."""
    made, start = {}, 1
    for name in sorted(tensors):
        shape, size = tensors[name].shape, tensors[name].numel()
        places = torch.arange(start, start + size)
        made[name] = (places if exact else (places * 40503 >> 4) % 256).float().view(shape)
        start += size
    assert start < 2**24, "float32 does not hold every code"
    return made


# ---- a rank --------------------------------------------------------------------------------------------------------


def settings(folder: Path, family: str, size: int, *flags: str) -> tuple[RunConfig, Namespace]:
    given = ["--hf-checkpoint", str(folder / family), "--actor-num-gpus-per-node", str(size)]
    return parse([*FLAGS, *given, *flags])


def make(config: RunConfig, ranks: Ranks, *, role: str = "actor") -> Any:
    from megatron.core import parallel_state as mpu

    from miles.trainer.megatron.backend import MegatronBackend
    from miles.trainer.megatron.ranks import make_groups
    from miles.trainer.megatron.settings import MegatronSettings

    forget(CHUNKS)
    mpu.destroy_model_parallel()
    own = make_groups(ranks, config.layout, seed=1, timeout_minutes=2)
    made = MegatronBackend(MegatronSettings.of(config), config.optimizer, own, role=role, seed=3)  # type: ignore[arg-type]
    CHUNKS[:] = made.model_chunks
    return made


CHUNKS: list[Any] = []


@dataclass
class Codes:
    """What a rank should hold, by names of its parameters; the critic's head has one row of its own."""

    backend: Any
    folder: Path
    found: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from miles.trainer.megatron import convert

        models, own_head = self.backend._models(), self.backend.role == "critic"
        self.found = dict(convert.read_hf(self.folder, models, self.backend.config, flag="--x", own_head=own_head))
        for name, own in convert.local_parameters(self.backend.model_chunks).items():
            if name not in self.found:
                assert "output_layer" in name, name
                self.found[name] = torch.arange(1, own.numel() + 1).float().view(own.shape)

    def __getitem__(self, name: str) -> Tensor:
        return self.found[name]


def slots(backend: Any) -> Iterator[tuple[str, Any, Any, slice | None]]:
    """(name of a parameter, part of the optimizer, what that steps for it, which places of it) of this rank."""
    from miles.trainer.megatron import convert

    names = {id(parameter): name for name, parameter in convert.local_parameters(backend.model_chunks).items()}
    for part in backend.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        if hasattr(part, "gbuf_ranges"):
            for parameter, (group, order) in part.model_param_group_index_map.items():
                places = part._get_model_param_range_map(parameter)["param"]
                stepped = part.optimizer.param_groups[group]["params"][order]
                yield names[id(parameter)], part, stepped, slice(places.start, places.end)
        else:
            masters = {id(getattr(p, "main_param", p)): id(p) for p in _parameters(backend)}
            for group in part.optimizer.param_groups:
                for stepped in group["params"]:
                    yield names[masters[id(stepped)]], part, stepped, None


def _parameters(backend: Any) -> Iterator[Tensor]:
    for chunk in backend.model_chunks:
        yield from chunk.parameters()


def cut(codes: Tensor, places: slice | None) -> Tensor:
    return codes if places is None else codes.reshape(-1)[places]


def fill(backend: Any, codes: Codes, steps: int, *, is_bf16: bool) -> None:
    """Codes into everything. `steps` 0: an optimizer that has never stepped, and so has no moments yet."""
    from miles.trainer.megatron import convert

    with torch.no_grad():
        for name, parameter in convert.local_parameters(backend.model_chunks).items():
            parameter.copy_(codes[name])
        for name, part, stepped, places in slots(backend):
            own = cut(codes[name], places)
            stepped.copy_(own + HALF if is_bf16 else own)
            if steps:
                part.optimizer.state[stepped] = {
                    "step": torch.tensor(float(steps)), "exp_avg": own + 0.25, "exp_avg_sq": own * 2,
                }  # fmt: skip
        for group in backend.optimizer.param_groups:
            group["weight_decay"], group["eps"] = 0.7, 0.3  # what must not come back
    backend.scheduler.num_steps = steps


def problems(backend: Any, codes: Codes, steps: int, own_settings: list[Any], *, is_bf16: bool) -> list[str]:
    """What is not as it should be after loading, and how many places were looked at. Rows that pad a vocabulary belong
    to no token, and nothing is asked of them."""
    from miles.trainer.megatron import convert

    wrong, seen = [], 0
    for name, parameter in convert.local_parameters(backend.model_chunks).items():
        real = real_places(codes[name], name, backend)
        if not torch.equal(parameter.detach()[real].float(), codes[name][real].float()):
            wrong.append(f"weight {name}")
    for name, part, stepped, places in slots(backend):
        own, state = cut(codes[name], places), part.optimizer.state[stepped]
        real = cut(real_places(codes[name], name, backend), places)
        expected = {
            "exp_avg": (state["exp_avg"], own + 0.25 if steps else own * 0),
            "exp_avg_sq": (state["exp_avg_sq"], own * 2 if steps else own * 0),
            "master": (stepped.detach(), own + HALF if is_bf16 else own),
        }
        for kind, (there, value) in expected.items():
            if there.dtype != torch.float32 or not torch.equal(there[real], value[real]):
                wrong.append(f"{kind} {name}: {there[real][:4]} for {value[real][:4]}")
        if float(state["step"]) != steps:
            wrong.append(f"step {name}: {state['step']}")
        seen += int(real.sum())
    pointers = [s["step"].data_ptr() for p in backend.optimizer.chained_optimizers for s in p.optimizer.state.values()]
    if len(set(pointers)) != len(pointers):
        wrong.append("parameters share the tensor of their step")
    if settings_of(backend) != own_settings:
        wrong.append(f"settings {settings_of(backend)} for {own_settings}")
    if backend.scheduler.num_steps != steps:
        wrong.append(f"schedule {backend.scheduler.num_steps}")
    return [f"{seen} places", *wrong]


def settings_of(backend: Any) -> list[Any]:
    return [{k: v for k, v in group.items() if k != "params"} for group in backend.optimizer.param_groups]


def real_places(codes: Tensor, name: str, backend: Any) -> Tensor:
    """Which places belong to a token, or to no vocabulary at all."""
    from megatron.core import parallel_state as mpu

    real = torch.ones(codes.shape, dtype=torch.bool)
    if "word_embeddings" in name or ("output_layer" in name and backend.role == "actor"):
        first = mpu.get_tensor_model_parallel_rank() * codes.shape[0]
        real[max(0, backend.hf_config.vocab_size - first) :] = False
    return real


def run_case(case: Case, folder: Path, ranks: Ranks, at: Path) -> list[str]:
    is_bf16 = "--bf16" in case.flags
    source = folder / f"{case.family} {'small' if is_bf16 else 'codes'}"
    config, _ = settings(folder, case.family, ranks.size, *LAYOUTS[case.saved], *case.flags)
    saving = make(config, ranks, role=case.role)
    fill(saving, Codes(saving, source), case.steps, is_bf16=is_bf16)
    save(saving, at, ranks, background=case.background)
    config, _ = settings(folder, case.family, ranks.size, *LAYOUTS[case.loaded], *case.flags)
    del saving
    loading = make(config, ranks, role=case.role)
    loading.use_schedule(Schedule(max_lr=0.5))
    before = settings_of(loading)
    loading.load(at, with_optimizer=True)
    return problems(loading, Codes(loading, source), case.steps, before, is_bf16=is_bf16)


def save(backend: Any, at: Path, ranks: Ranks, *, background: bool = False, with_optimizer: bool = True) -> None:
    at.mkdir(exist_ok=True)
    ranks.sum(torch.zeros(1))
    backend.save(at, with_optimizer=with_optimizer, background=background)
    if background:
        with torch.no_grad():  # what is written is what there was
            for parameter in _parameters(backend):
                parameter.zero_()
            for _, part, stepped, _ in slots(backend):
                stepped.zero_()
                for value in part.optimizer.state.get(stepped, {}).values():
                    value.zero_()
    backend.finish_saving()


# ---- training that goes on -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A rollout on `saved`, a checkpoint, another rollout on `loaded`; beside two rollouts on `saved`."""

    family: str
    saved: str
    loaded: str
    flags: tuple[str, ...] = ()


# Weights beside those in training: an older policy, and a reference that moves.
OTHERS = (
    *("--keep-old-actor", "--use-kl-loss", "--kl-loss-coef", "0.1", "--ref-load", "{reference}"),
    *("--ref-update-interval", "1"),
)  # fmt: skip

TRAINED: dict[int, dict[str, Trained]] = {
    1: {
        "alone": Trained("qwen3", "whole", "whole", OTHERS),
        "alone plain": Trained("qwen3", "whole", "whole", PLAIN),
    },
    4: {
        "same layout": Trained("llama tied", "tp2 pp2", "tp2 pp2", OTHERS),
        "same layout, experts": Trained("moe", "ep2 pp2", "ep2 pp2"),
        "whole to tp2 pp2": Trained("qwen3", "whole", "tp2 pp2", OTHERS),
        "tp2 pp2 to whole": Trained("qwen3", "tp2 pp2", "whole"),
    },
}


def actor_on(layout: str, trained: Trained, folder: Path, ranks: Ranks) -> TrainActor:
    flags = [word.format(reference=folder / f"{trained.family} small") for word in trained.flags]
    config, args = settings(folder, trained.family, ranks.size, *LAYOUTS[layout], *flags)
    backend = make(config, ranks)
    backend.use_schedule(Schedule(max_lr=5e-3, warmup=4))
    return TrainActor(backend, config, args, bind(args), Tracker(sinks=[]), transport=None, on_step=lambda: None)


def train(actor: TrainActor, rollout_id: int) -> None:
    config = actor.config
    assert config.data.global_batch_size is not None
    shards = split_batch(rollout("mixed"), config.layout.dp_size, balance=False)
    actor.train_shards(rollout_id, shards, config.data.global_batch_size)


def weights_of(actor: TrainActor) -> dict[str, Tensor]:
    """Whole, by their names in the Hugging Face folder, on rank 0."""
    buckets = actor.backend.weights().buckets(1 << 30)
    return {name: tensor.float().clone() for bucket in buckets for name, tensor in bucket.items()}


def run_trained(trained: Trained, folder: Path, ranks: Ranks, at: Path) -> dict[str, Any]:
    straight = actor_on(trained.saved, trained, folder, ranks)
    train(straight, 0)
    half = weights_of(straight)
    at.mkdir(exist_ok=True)
    ranks.sum(torch.zeros(1))
    straight.save(at, with_optimizer=True, background=True)
    straight.update_weights()
    train(straight, 1)
    straight.finish_saving()
    expected = weights_of(straight)
    steps = straight.steps_done
    del straight
    resumed = actor_on(trained.loaded, trained, folder, ranks)
    resumed.restore(at, Restoring(weight_version=1, steps_done=steps // 2))
    there = weights_of(resumed)
    resumed.update_weights()
    train(resumed, 1)
    return {
        "half": half, "there": there, "expected": expected, "found": weights_of(resumed),
        "steps": (steps, resumed.steps_done),
    }  # fmt: skip


# ---- what is no checkpoint of ours ---------------------------------------------------------------------------------


class Evil:
    """Reading its pickle makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.file}'",)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def described(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the description of a checkpoint."""
    description = pickle.loads((folder / ".metadata").read_bytes())
    change(description)
    (folder / ".metadata").write_bytes(pickle.dumps(description))


def bytes_for_a_tensor(description: Any) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    description.state_dict_metadata["decoder.final_layernorm.weight"] = BytesStorageMetadata()


def pickled(module: str, name: str) -> bytes:
    """A description that calls `module.name()`."""
    words = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)]
    return b"\x80\x04" + b"".join(words) + b"\x93)R."


DAMAGE: dict[str, Callable[[Path], object]] = {
    "description that runs a command": lambda f: (f / ".metadata").write_bytes(pickle.dumps(Evil(f / "evil"))),
    "description that reaches further": lambda f: (f / ".metadata").write_bytes(
        pickled("torch.distributed.checkpoint.planner", "io.StringIO")
    ),
    "description that names a function": lambda f: (f / ".metadata").write_bytes(
        pickled("torch.distributed.checkpoint.planner", "reduce")
    ),
    "description that makes a writer": lambda f: (f / ".metadata").write_bytes(pickled("torch", "PyTorchFileWriter")),
    "description cut short": lambda f: cut_short(f / ".metadata"),
    "description gone": lambda f: (f / ".metadata").unlink(),
    "common part that runs a command": lambda f: torch.save(Evil(f / "evil"), f / "common.pt"),
    "common part gone": lambda f: (f / "common.pt").unlink(),
    "mark": lambda f: (f / "metadata.json").write_text("{"),
    "pieces cut short": lambda f: [cut_short(piece) for piece in f.glob("*.distcp")],
    "a piece gone": lambda f: next(f.glob("*.distcp")).unlink(),
    "bytes for a tensor": lambda f: described(f, bytes_for_a_tensor),
    "a moment gone": lambda f: described(
        f, lambda d: d.state_dict_metadata.pop("optimizer.state.exp_avg.decoder.final_layernorm.weight")
    ),
}


def refusals(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What is said about each of them, and what ran."""
    from miles.errors import CheckpointError

    def said(backend: Any, at: Path) -> str:
        try:
            backend.load(at, with_optimizer=True)
        except CheckpointError as error:
            return str(error)
        return "loaded"

    found: dict[str, Any] = {}
    ours = make(settings(folder, "qwen3", 1)[0], ranks)
    good = folder / "good"
    save(ours, good, ranks)
    for name, damage in DAMAGE.items():
        bad = shutil.copytree(good, folder / f"bad {name}")
        damage(bad)
        found[name] = said(ours, bad)
        found[f"{name} ran"] = (bad / "evil").exists()
    found["good"] = said(ours, good)
    found["other optimizer"] = said(make(settings(folder, "qwen3", 1, *PLAIN)[0], ranks), good)
    found["other architecture"] = said(make(settings(folder, "qwen2", 1)[0], ranks), good)
    found["fewer layers"] = said(make(settings(folder, "two layers", 1)[0], ranks), good)
    return found


def of_others(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A checkpoint of Megatron's own training, with objects that it would run: what is there after loading."""
    from megatron.core import dist_checkpointing
    from megatron.core.enums import ModelType

    from miles.trainer.megatron import convert

    config, _ = settings(folder, "qwen3", 1, *BF16)
    theirs = make(config, ranks)
    convert.load_hf(folder / "qwen3 small", theirs._models(), theirs.config)
    at = folder / "theirs"
    at.mkdir()
    module = theirs._models()[0].decoder.layers[0].self_attention.linear_proj
    module.get_extra_state = lambda: Evil(at / "evil")
    dist_checkpointing.save(
        {
            **{"args": Namespace(lr=1.0, mode=ModelType.encoder_or_decoder), "iteration": 5, "checkpoint_version": 3.0},
            **{"opt_param_scheduler": {"num_steps": 640, "max_lr": 1.0}, **theirs._models()[0].sharded_state_dict()},
        },
        str(at),
    )
    ours = make(config, ranks)
    ours.use_schedule(Schedule(max_lr=0.5))
    ours.load(at, with_optimizer=True)
    own, expected = convert.local_parameters(ours.model_chunks), Codes(ours, folder / "qwen3 small")
    masters = [torch.equal(stepped, cut(expected[name], places).float()) for name, _, stepped, places in slots(ours)]
    return {
        "weights": [n for n, p in own.items() if not torch.equal(p, expected[n])],
        "masters": all(masters) and len(masters) > 30,
        "steps": ours.scheduler.num_steps,
        "ran": (at / "evil").exists(),
        "is there": any(b"touch '" in piece.read_bytes() for piece in at.glob("*.distcp")),
    }


def snapshots(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Weights beside those of the model: written, read, and read from what others wrote."""
    from miles.errors import CheckpointError

    backend = make(settings(folder, "qwen3", 1)[0], ranks)
    before = backend.snapshot()
    other = {name: torch.randn(tensor.shape) for name, tensor in before.items()}
    at = folder / "snapshot"
    at.mkdir()
    backend.write_snapshot(other, at)
    read = backend.read_snapshot(at, flag="--ref-load")
    (folder / "of fsdp" / "model").mkdir(parents=True)
    try:
        backend.read_snapshot(folder / "of fsdp", flag="--ref-load")
    except CheckpointError as error:
        said = str(error)
    return {
        "read": all(torch.equal(read[name], tensor) for name, tensor in other.items()) and len(read) > 30,
        "kept": all(torch.equal(before[name], tensor) for name, tensor in backend.snapshot().items()),
        "said": said,
    }


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(
        rank, size, folder / f"store{size}", backend="gloo", cpu_backend="gloo", timeout_s=60, device="cpu"
    )
    only = sys.argv[4:]
    for name in [n for n in CASES[size] if not only or n in only]:
        found = run_case(CASES[size][name], folder, ranks, folder / f"ck {size} {name}")
        torch.save(found, folder / f"{size} {name} {rank}.pt")
    for name in [n for n in TRAINED[size] if not only or f"trained {n}" in only]:
        after = run_trained(TRAINED[size][name], folder, ranks, folder / f"trained {size} {name}")
        if rank == 0:
            torch.save(after, folder / f"trained {size} {name}.pt")
    if size == 1:
        for part in (refusals, of_others, snapshots):
            torch.save(part(folder, ranks), folder / f"{part.__name__}.pt")
    ranks.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
