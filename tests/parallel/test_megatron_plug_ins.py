"""Plug-ins of Megatron on two ranks: hooks are called when the contract says, models of providers train as the built-in
one does, losses and reducers find their part."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import megatron_plug_in_cases
import pytest
import torch
from megatron_plug_in_cases import CASES, ROLLOUTS, run
from megatron_plug_ins import REFUSED
from parallel_cases import STEPS, make_model
from rank_programs import run_ranks

pytest.importorskip("megatron.core")

RELATIVE, ROUNDING = 1e-4, 2e-6
HOOKED = [name for name in CASES if name.startswith("hooks")]
COMPARED = [name for name, case in CASES.items() if case.as_one is not None]

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plug_ins")
    for case in CASES.values():
        for seed in (0, 1):
            make_model(folder, tied=case.tied, seed=seed, layers=case.layers)
    for size in (1, 2):
        run_ranks(Path(megatron_plug_in_cases.__file__), size, folder)
    return folder


def result(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name} {rank}.pt")
    return found


# ---- the same as without -------------------------------------------------------------------------------------------


@functools.cache
def one_process(name: str, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run(CASES[name], folder, None)


@pytest.mark.parametrize("name", COMPARED)
def test_it_trains_as_one_process_does(name: str, trained: Path) -> None:
    """Losses, gradient norms and all metrics of three optimizer steps, and the weights after them, are those of the
    Hugging Face model."""
    got, want = result(trained, name), one_process(name, trained)
    for ours, theirs in zip(got["steps"], want["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE, abs=ROUNDING)
    assert len(want["steps"]) >= STEPS and any(step.get("train/grad_norm", 0) > 1e-3 for step in want["steps"])
    state = {name: tensor for name, tensor in want["weights"].items() if name in got["weights"]}
    assert state.keys() == got["weights"].keys() and len(state) > 10
    for key, tensor in state.items():
        assert torch.allclose(got["weights"][key], tensor, rtol=RELATIVE, atol=1e-5), key


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused(name: str, trained: Path) -> None:
    text = (trained / f"{name}.txt").read_text()
    flag, _, place = text.splitlines()[0].partition(" failed at ")
    assert flag.startswith("--custom-model-provider-path ") and flag.endswith(f":{name}")
    assert "megatron_plug_ins.py:" in place and REFUSED[name] in text


# ---- hooks ---------------------------------------------------------------------------------------------------------


def seen(folder: Path, name: str, rank: int) -> Seen:
    found: Seen = result(folder, name, rank)["seen"]
    return found


RANKED = pytest.mark.parametrize(("name", "rank"), [(name, rank) for name in HOOKED for rank in (0, 1)])


@RANKED
def test_the_order_on_every_rank(name: str, rank: int, trained: Path) -> None:
    def told(call: dict[str, Any]) -> str:
        return call["call"] + ("" if call["call"] in ("init", "model") else f" {call['role']}")

    critic, actor = ["train_step critic"] * STEPS, ["train_step actor"] * STEPS
    models = ["model", "model"] if name == "hooks pp" else []
    passes = ["log_prob critic", "log_prob actor", "log_prob actor"]
    calls = seen(trained, name, rank)
    assert [told(call) for call in calls] == ["init", *models, *ROLLOUTS * [*passes, *critic, *actor]]
    prefixes = [call["prefix"] for call in calls if call["call"] == "log_prob"]
    assert prefixes == ROLLOUTS * ["", "ref_", ""]
    steps = [(call["rollout"], call["step"]) for call in calls if call.get("role") == "actor" and "step" in call]
    assert steps == [(rollout, step) for rollout in range(ROLLOUTS) for step in range(STEPS)]


@RANKED
def test_the_state_they_see(name: str, rank: int, trained: Path) -> None:
    calls = seen(trained, name, rank)
    assert {call["args"] for call in calls} == {result(trained, name, rank)["args"]}
    for call in calls:
        if "role" in call:
            assert call["same_args"] and call["chunks"] == 1
        if call["call"] == "log_prob":
            assert not any(call["training"]) and not call["grad"]
        elif call["call"] == "train_step":
            assert all(call["training"]) and call["grad"] and call["gradient"] == 0 and call["rates"] >= 1


@RANKED
def test_the_weights_are_those_of_the_pass(name: str, rank: int, trained: Path) -> None:
    calls = [call for call in seen(trained, name, rank) if call.get("role") == "actor"]
    reference = [call["weights"] for call in calls if call.get("prefix") == "ref_"]
    policy = [call["weights"] for call in calls if call.get("prefix") == ""]
    steps = [call["weights"] for call in calls if call["call"] == "train_step"]
    assert len(set(reference)) == 1 and reference[0] not in policy
    assert policy[0] == steps[0] and policy[1] == steps[STEPS], "a pass has the weights that training left"
    assert len(set(steps)) == len(steps)
    done = [call["steps_done"] for call in calls if call["call"] == "train_step"]
    assert done == list(range(ROLLOUTS * STEPS))


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("hooks tp", ["tp0 pp0", "tp1 pp0"]),
        ("hooks pp", ["tp0 pp0", "tp0 pp1"]),
        ("hooks dp", ["tp0 pp0", "tp0 pp0"]),
        ("hooks fsdp", ["none", "none"]),
    ],
)
def test_init_finds_the_process_groups(name: str, groups: list[str], trained: Path) -> None:
    assert [seen(trained, name, rank)[0]["groups"] for rank in (0, 1)] == groups


def test_providers_are_told_their_stage(trained: Path) -> None:
    for rank, stages in enumerate([(True, False), (False, True)]):
        built = [call for call in seen(trained, "hooks pp", rank) if call["call"] == "model"]
        assert [call["stages"] for call in built] == [stages, stages], "of the actor, and of the critic"


def test_a_provider_can_have_a_critic_built(trained: Path) -> None:
    assert {call["values"] for call in seen(trained, "model dp", 0)} == {(1, 32)}
