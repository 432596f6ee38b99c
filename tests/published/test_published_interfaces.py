"""The machinery around plug-ins: the switch of the two trees, options and attributes of their own, threads."""

from __future__ import annotations

import asyncio
import copy
import importlib
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from published_runs import BASE, logged, train

from miles.config import parse
from miles.hooks import bind
from miles.observe.record import read_rollouts
from miles.rollout import context
from miles.rollout.inference_rollout import compatibility
from miles.rollout.rm_hub import async_rm, batched_async_rm
from miles.types import RolloutFnConstructorInput, RolloutFnEvalInput, RolloutFnTrainInput, RolloutFnTrainOutput, Sample
from miles.utils.eval_config import DATASET_RUNTIME_SPECS, EvalDatasetConfig, _apply_dataset_field_overrides
from miles.utils.misc import function_registry, load_function

SWITCH = "MILES_EXPERIMENTAL_ROLLOUT_REFACTOR"


def parsed(folder: Path, *flags: str) -> Namespace:
    (folder / "base.yaml").write_text(BASE)
    return parse(["--config", str(folder / "base.yaml"), "--run-dir", str(folder / "run"), *flags])[1]


def test_class_forms_with_options_and_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    (tmp_path / "plug.yaml").write_text(
        "max_turns: 3\nrollout_interaction_env_path: new_style.environment\nnested: {a: [1]}\n"
    )
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "100+200=?", "label": "300"}\n')
    run = train(
        tmp_path,
        "--rollout-function-path", "new_style.BranchRollout", "--branch-width", "5",
        "--custom-generate-function-path", "new_style.InteractiveGenerate", "--environment-noise", "0.25",
        "--custom-config-path", str(tmp_path / "plug.yaml"), "--rm-type", "random",
        "--eval-prompt-data", "held", str(held), "--eval-interval", "2", "--skip-eval-before-train",
    )  # fmt: skip
    module = importlib.import_module("new_style")
    # One object for training and one for evaluation.
    assert [built.calls for built in module.BUILT] == [2, 1]
    assert set(module.TURNS) == {(3, 0.25, False), (3, 0.25, True)}
    assert logged(run, "agent/width") == [5, 5, 5] and logged(run, "agent/calls") == [1, 2, 1]
    assert all(s.metadata["feedback"] == f"{s.label}!" for s in read_rollouts(run, 1))


@pytest.mark.parametrize(
    ("value", "default"),
    [
        ("0", "miles.rollout.sglang_rollout.generate_rollout"),
        ("1", "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn"),
    ],
)
def test_the_switch_picks_a_default_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, default: str
) -> None:
    monkeypatch.setenv(SWITCH, value)
    flags = ("--custom-generate-function-path", "new_style.InteractiveGenerate", "--environment-noise", "1")
    args = parsed(tmp_path, *flags)
    assert args.rollout_function_path == args.eval_function_path == default
    assert args.environment_noise == 1.0


def test_args_can_be_written_to_and_copied(tmp_path: Path) -> None:
    (tmp_path / "plug.yaml").write_text("nested: {a: [1]}\nrollout_max_response_len: 5\n")
    args = parsed(tmp_path, "--custom-config-path", str(tmp_path / "plug.yaml"), "--rm-type", "random")
    assert args.nested == {"a": [1]} and args.rollout_max_response_len == 5
    args.mine = object()
    other = copy.deepcopy(args)
    other.nested["a"].append(2)
    other.rollout_batch_size = 99
    assert args.nested == {"a": [1]} and args.rollout_batch_size == 4


# ---- attributes that plug-ins read and set -------------------------------------------------------------------------


def test_what_shared_objects_carry(tmp_path: Path) -> None:
    from miles.rollout import sglang_rollout
    from miles.rollout.data_source import RolloutDataSourceWithBuffer
    from miles.rollout.inference_rollout import inference_rollout_common

    args = parsed(tmp_path, "--rm-type", "random", "--custom-generate-function-path", "search_generate.generate")
    function_tree, other = sglang_rollout.GenerateState(args), sglang_rollout.GenerateState(copy.deepcopy(args))
    assert function_tree is other and function_tree.args is args
    class_tree = inference_rollout_common.GenerateState(args)
    assert class_tree is not inference_rollout_common.GenerateState(args)
    for state in (function_tree, class_tree):
        assert state.tokenizer.encode("1", add_special_tokens=False) and state.processor is None
        assert state.sampling_params["max_new_tokens"] == 24 and state.aborted is False
    assert (function_tree.dp_counts, function_tree.remaining_batch_size, function_tree.pendings) == ([0], 0, set())
    assert function_tree.group_sampling_seeds is None and not function_tree.semaphore.locked()
    assert isinstance(class_tree.generate_function, compatibility.LegacyGenerateFnAdapter)

    source = RolloutDataSourceWithBuffer(args)
    counters = (source.epoch_id, source.sample_group_index, source.sample_index, source.sample_offset)
    assert counters == (0, 0, 0, 0) and source.metadata == {} and source.buffer == [] and callable(source.buffer_filter)
    dataset = source.dataset
    assert len(dataset) == len(dataset.samples) == len(dataset.origin_samples) and dataset[0] is dataset.samples[0]
    assert dataset.seed == args.rollout_seed
    rollout = inference_rollout_common.InferenceRolloutFn(RolloutFnConstructorInput(args, source))
    assert rollout.data_source is source and rollout.state.args is args and rollout.eval_prompt_dataset_cache == {}


# ---- rewards from plug-ins -----------------------------------------------------------------------------------------


def reward_args(**given: Any) -> Namespace:
    return Namespace(**{"custom_rm_path": None, "rm_type": None, "reward_key": None, "group_rm": False, **given})


async def by_length(args: Namespace, samples: Any, **kwargs: Any) -> Any:
    if isinstance(samples, list):
        return [len(sample.response) for sample in samples]
    return len(samples.response)


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards need no engine: nothing may ask for one."""
    nobody: Any = None
    monkeypatch.setattr(context, "current", lambda args: context.RunContext(hooks=bind(args), client=nobody))


@pytest.mark.usefixtures("no_engines")
def test_rewards_in_place() -> None:
    with function_registry.temporary("test:by_length", by_length):
        assert load_function("test:by_length") is by_length
        args = reward_args(custom_rm_path="test:by_length")
        samples = [Sample(response="a" * n) for n in (1, 3)]
        assert asyncio.run(batched_async_rm(args, samples)) == [1, 3]
        assert [s.reward for s in samples] == [None, None]
        assert asyncio.run(batched_async_rm(args, samples, inplace_set_reward_field=True, more=1)) is None
        assert [s.reward for s in samples] == [1, 3]
        with pytest.raises(AssertionError, match="Overriding"):
            asyncio.run(batched_async_rm(args, samples, inplace_set_reward_field=True))
        assert asyncio.run(async_rm(args, samples[1], something="else")) == 3


@pytest.mark.usefixtures("no_engines")
def test_the_metadata_of_a_sample_picks_its_reward() -> None:
    samples = [
        Sample(response="the cat", label="cat", metadata={"rm_type": "f1"}),
        Sample(response="x", label="x", metadata={"rm_type": " random "}),
    ]
    first, second = asyncio.run(batched_async_rm(reward_args(rm_type="random"), samples)) or []
    assert first == 1.0 and second in (0, 1)


@pytest.mark.usefixtures("no_engines")
def test_rewards_from_threads_with_loops_of_their_own() -> None:
    got: list[Any] = []

    def work() -> None:
        with_args = reward_args(rm_type="f1")
        samples = [Sample(response="b", label="b") for _ in range(8)]

        async def many() -> None:
            got.append(await asyncio.gather(*(async_rm(with_args, sample) for sample in samples)))

        asyncio.run(many())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert got == [[1.0] * 8] * 3


# ---- rollout functions that plug-ins load and call themselves --------------------------------------------------------


def test_loading_and_calling_rollout_functions() -> None:
    calls: list[Any] = []

    def function(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        calls.append((rollout_id, data_source, evaluation))
        return {"set": {"rewards": [1.0]}} if evaluation else [[Sample()]]

    class Rollout:
        def __init__(self, given: RolloutFnConstructorInput) -> None:
            self.source = given.data_source

        async def __call__(self, given: Any) -> Any:
            return RolloutFnTrainOutput(samples=[], metrics={"id": given.rollout_id})

    given = RolloutFnConstructorInput(args=Namespace(), data_source="source")
    with function_registry.temporary("test:f", function), function_registry.temporary("test:c", Rollout):
        old = compatibility.load_rollout_function(given, "test:f")
        new = compatibility.load_rollout_function(given, "test:c")
    assert compatibility.call_rollout_function(old, RolloutFnTrainInput(3)).samples == [[Sample()]]
    assert compatibility.call_rollout_function(old, RolloutFnEvalInput(4)).data == {"set": {"rewards": [1.0]}}
    assert calls == [(3, "source", False), (4, "source", True)]
    assert compatibility.call_rollout_function(new, RolloutFnTrainInput(7)).metrics == {"id": 7}
    assert new.source == "source" and compatibility.load_generate_function(None) is None


# ---- evaluation settings that plug-ins extend ------------------------------------------------------------------------


def test_a_data_set_entry_with_fields_of_its_own() -> None:
    """An evaluation against an external service, with the shipped precedence: entry, then defaults, then args."""
    own = {"num_workers": {"dataset_keys": ("num_workers",), "default_keys": ("num_workers",), "arg_attrs": ()}}
    args = Namespace(
        eval_temperature=None, rollout_temperature=0.5, eval_top_p=0.9, rollout_top_p=1.0, eval_top_k=None,
        rollout_top_k=-1, eval_max_response_len=None, rollout_max_response_len=64, n_samples_per_eval_prompt=2,
        n_samples_per_prompt=8, rollout_stop=None, rollout_stop_token_ids=None,
    )  # fmt: skip
    entry = {"name": "a", "path": "a.jsonl", "top_k": None, "temperature": 0.1}
    defaults = {"num_workers": 4, "temperature": 0.7}
    _apply_dataset_field_overrides(args, entry, defaults, {**DATASET_RUNTIME_SPECS, **own})
    assert entry["num_workers"] == 4 and entry["temperature"] == 0.1 and entry["top_p"] == 0.9
    assert entry["top_k"] is None and entry["n_samples_per_eval_prompt"] == 2 and entry["max_response_len"] == 64
    del entry["num_workers"]
    config = EvalDatasetConfig(**entry, metadata_overrides={"x": 1}, rm_type="f1")
    assert config.inject_metadata({"x": 0, "y": 2}) == {"x": 1, "y": 2, "rm_type": "f1"}
    assert config.inject_metadata("no dict") == {"x": 1, "rm_type": "f1"}
    with pytest.raises(TypeError):
        EvalDatasetConfig(name="a", path="a.jsonl", unknown=1)  # type: ignore[call-arg]
