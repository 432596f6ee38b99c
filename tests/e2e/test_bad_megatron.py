"""--train-backend megatron and what it cannot do, or can although it looks as if it could not.

Folders, flags and layouts that do not fit end in a sentence; odd batches train as in one process without Megatron; a
launch script in published style runs as it is. What ranks do to each other is in tests/parallel/test_megatron_ranks.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_runs import BASE, CLOCKED, HERE, QUICKSTART, ROOT, exported, flags, metrics, miles, train
from moe_model import make_moe
from safetensors.torch import load_file

from miles.observe.record import read_metrics

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

MEGATRON = ("--train-backend", "megatron", "--distributed-timeout-minutes", 2)
TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
BATCHES = HERE / "bad_batches.py"
NO_ENGINE = ("--debug-train-only", "--rollout-batch-size", 2, "--num-steps-per-rollout", 1)
USAGE = 2
LAUNCH = HERE / "run-qwen3-tiny.sh"
ONE_MINUTE_S = 60.0


def of(name: str) -> tuple[object, ...]:
    return "--rollout-function-path", f"{BATCHES}:{name}", *NO_ENGINE


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*flags)`: what `miles train --train-backend megatron` with these flags says on standard error."""

    def says(*more: object) -> str:
        status = miles("train", *flags(tmp_path / "run", *MEGATRON, *more))
        said = capfd.readouterr().err
        assert status == USAGE and "Traceback" not in said and "Warning" not in said, said
        return said

    return says


# ---- what does not fit, found before a process is started ----------------------------------------------------------

FLAGS = {
    "heads": ((TP, 3), f"{TP} 3: must divide the 4 attention heads of the model."),
    "more stages than layers": ((TP, 4, PP, 4), f"{PP} 4: the model has 3 layers, fewer than stages."),
    "stages that do not divide": ((PP, 2), f"{PP} 2: 3 layers cannot be divided among 2 equal stages."),
    "experts": (("--expert-model-parallel-size", 2), "--expert-model-parallel-size 2: the model has no experts."),
    "the model's numbers": (
        ("--num-layers", 4, "--hidden-size", 64, "--untie-embeddings-and-output-weights"),
        "--num-layers 4: config.json says 3\n--hidden-size 64: config.json says 128\n"
        "--untie-embeddings-and-output-weights: config.json says false\n"
        "Leave out what describes the model: it is read from",
    ),
    "no such flag": (("--tensor-model-paralel-size", 2), f"no such flag. Did you mean {TP} or"),
    "no such switch": (("--sequence-paralel",), "--sequence-paralel: no such flag. Did you mean --sequence-parallel?"),
    "no number": ((CP, "two"), f"{CP}: expected a whole number, got 'two'."),
    "half a rank": ((TP, 1.5), f"{TP}: expected a whole number, got '1.5'."),
    "no ranks": ((TP, 0), f"{TP}: expected a value >= 1, got 0."),
    "fewer than none": ((PP, -2), f"{PP}: expected a value >= 1, got -2."),
    "fewer layers than none": (("--num-layers", -3), "--num-layers: expected a value >= 1, got -3."),
    "no such choice": (
        ("--recompute-granularity", "half"),
        "--recompute-granularity: expected one of full, selective, got 'half'.",
    ),
    "no processes for it": ((TP, 2, "--actor-num-gpus-per-node", 3), f"expected a multiple of 2, because of {TP} 2"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case: str, refused: Callable[..., str]) -> None:
    given, says = FLAGS[case]
    assert says in refused(*given)


def test_without_megatron_core_the_command_is_given(tmp_path: Path) -> None:
    """In a process that finds nothing of it, as where it is not installed."""
    program = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
from miles.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "train", *flags(tmp_path / "run", *MEGATRON)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == USAGE
    assert process.stderr == (
        "miles: --train-backend megatron: Megatron-Core is not installed. pip install 'miles[megatron]'\n"
    )
    assert not (tmp_path / "run").exists()


# ---- what only the ranks can find ----------------------------------------------------------------------------------


def test_weights_that_are_not_those_of_config_json(refused: Callable[..., str], model: Callable[..., Path]) -> None:
    """Each rank finds it, and it is said once."""
    folder = model({"intermediate_size": 400})
    said = refused("--hf-checkpoint", folder, TP, 2)
    assert said.count("miles: ") == 1 and said.count(f"--hf-checkpoint {folder}: the weights are not those of") == 1
    assert said.count("model.layers.1.mlp.up_proj.weight: [384, 128] in the folder, [400, 128] in the model") == 1
    assert said.endswith("\nGive a folder whose *.safetensors are those of its config.json.\n")


def test_a_row_that_is_too_long_for_ranks_that_share_it(refused: Callable[..., str]) -> None:
    said = refused(*of("good"), CP, 2, "--max-tokens-per-gpu", 5)
    assert said.count("more than one micro batch may hold") == 1
    assert "--max-tokens-per-gpu is 5 for each of the 2 ranks that share it (--context-parallel-size)" in said


# ---- odd batches ---------------------------------------------------------------------------------------------------

ROLLOUTS = 5
LAYOUTS: dict[str, tuple[object, ...]] = {
    "data parallel": ("--actor-num-gpus-per-node", 2),
    "experts": ("--expert-model-parallel-size", 2),
    "tensor": (TP, 2, "--sequence-parallel", "--make-vocab-size-divisible-by", 1),
    "pipeline": (PP, 2, "--decoder-first-pipeline-num-layers", 2),
    "context": (CP, 2),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("models") / "moe")


def odd(run_dir: Path, experts: Path, *more: object) -> Path:
    sizes = ("--num-rollout", ROLLOUTS, "--max-tokens-per-gpu", 48, "--weight-decay", 0)
    return train(run_dir, "--hf-checkpoint", experts, *of("odd"), *sizes, *more)


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(CLOCKED)} for line in read_metrics(run_dir)
    ]


@pytest.fixture(scope="module")
def one_process(experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd(tmp_path_factory.mktemp("runs") / "fsdp", experts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_batches_train_as_in_one_process(layout: str, one_process: Path, experts: Path, tmp_path: Path) -> None:
    """Micro batches of very unequal numbers, a rank without work, a step without any, responses of one token, samples
    of which nothing counts: losses, gradients and everything else that is logged."""
    run = odd(tmp_path / "run", experts, *MEGATRON, *LAYOUTS[layout])
    for ours, theirs in zip(lines(run), lines(one_process), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-6)
    # 53 tokens are no multiple of 2: rows that tensor parallelism added are not written.
    got, want = exported(run), load_file(experts / "model.safetensors")
    assert {name: tensor.shape for name, tensor in got.items()} == {name: t.shape for name, t in want.items()}


def test_the_batches_are_odd(one_process: Path) -> None:
    zero, norms = metrics(one_process, "train/exactly_zero_samples"), metrics(one_process, "train/grad_norm")
    assert zero == {0: 0, 1: 4, 2: 8, 3: 0, 4: 4}
    assert [norm > 0 for norm in norms.values()] == [True, True, False, True, True]


# ---- a published launch script -------------------------------------------------------------------------------------

WITHOUT_MEANING = (
    "--sglang-mem-fraction-static 0.7",
    "--use-rotary-position-embeddings",
    "--attention-backend flash",
    "--expert-tensor-parallel-size",
)


def test_a_published_launch_script_trains(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    environment = {
        **os.environ, "RUN_DIR": str(run_dir), "MODEL": str(BASE), "DATA": str(QUICKSTART / "data" / "train.jsonl"),
        "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    assert len(set(re.findall(r"^ +(--[a-z0-9-]+)", LAUNCH.read_text(), re.MULTILINE))) >= 60
    process = subprocess.run(
        ["bash", str(LAUNCH), "--progress", "plain"],
        env=environment, capture_output=True, text=True, timeout=4 * ONE_MINUTE_S,
    )  # fmt: skip
    said = process.stdout + process.stderr
    assert process.returncode == 0, said
    told = [line.removeprefix("note: ") for line in said.splitlines() if ": no meaning here, " in line]
    assert sorted(line.split(": no meaning here")[0] for line in told) == sorted(WITHOUT_MEANING)
    assert len(metrics(run_dir, "train/loss")) == 2 and (run_dir / "model" / "model.safetensors").is_file()
    assert (run_dir / "ck" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"  # of rollouts 0 and 1
    assert "Warning" not in said, "what libraries say in every run is silenced"
