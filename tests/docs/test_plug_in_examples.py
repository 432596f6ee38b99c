"""examples/plug_ins: every file binds as its catalogue entry says, and those that a run calls really act in one.

Four runs of two rollouts with as many of them as fit together; each test looks at what one plug-in left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from safetensors.torch import load_file

from miles.__main__ import main
from miles.config.sections import FLAGS
from miles.hooks import CATALOG, Hook, bind, load_function
from miles.hooks.docs import example_of
from miles.observe.record import read_metrics, read_rollouts, read_summary
from miles.types import DynamicFilterOutput, Sample

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "plug_ins"
CARRY = ("--config", "examples/quickstart/carry.yaml", "--max-tokens-per-gpu", "2048")
TOOLS = ("--config", "examples/retool/multi_turn.yaml")
AGENT = ("--config", "examples/agentic/agentic.yaml")
SMALL = ("--num-rollout", "2", "--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--progress", "none")

# Which plug-ins one run takes together, with the flags that they need.
POLICY = (
    "data_source",
    "custom_generate_function",
    "custom_rm",
    "dynamic_sampling_filter",
    "rollout_sample_filter",
    "rollout_all_samples_process",
    "rollout_data_postprocess",
    "custom_tis_function",
    "custom_pg_loss_reducer_function",
    "custom_reward_post_process",
    "custom_rollout_log_function",
)
WHOLE = (
    "rollout_function",
    "buffer_filter",
    "custom_convert_samples_to_train_data",
    "custom_loss_function",
    "eval_function",
    "custom_eval_rollout_log_function",
)
MEGATRON = (
    "custom_megatron_init",
    "custom_megatron_before_log_prob_hook",
    "custom_megatron_before_train_step_hook",
    "custom_megatron_post_save_hook",
    "custom_model_provider",
)
CONVERSATION = ("generate_tool_specs", "generate_execute_tool_function")


def path_of(name: str) -> str:
    """The path that the command of an example gives to its own flag."""
    words = command_of(name)
    return words[words.index(CATALOG[name].flag) + 1]


def command_of(name: str) -> list[str]:
    return shlex.split(example_of(CATALOG[name]).command)


def flags_of(*names: str) -> list[str]:
    return [word for name in names for word in (CATALOG[name].flag, path_of(name))]


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Run:
    def run(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("plug_ins") / "run"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with contextlib.chdir(ROOT):
                assert main(["train", "--run-dir", str(folder), *SMALL, *flags]) == 0
        finally:
            torch.set_num_threads(threads)
        return folder

    return run


@pytest.fixture(scope="module")
def policy_run(train: Run) -> Path:
    """Two optimizer steps per rollout; a limit of tokens that cuts some responses off."""
    never = ("--eval-interval", "100", "--skip-eval-before-train")
    more = ("--use-tis", "--reward-key", "score", "--eval-reward-key", "right")
    return train(*CARRY, *flags_of(*POLICY), *more, "--rollout-max-response-len", "24", *never)


@pytest.fixture(scope="module")
def whole_run(train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short evaluation after the second rollout."""
    held = tmp_path_factory.mktemp("eval") / "eval.yaml"
    path = "examples/quickstart/data/heldout.jsonl@[0:12]"
    held.write_text(yaml.safe_dump({"datasets": [{"name": "held", "path": path, "n_samples_per_eval_prompt": 5}]}))
    more = ("--loss-type", "custom_loss", "--eval-config", str(held), "--eval-interval", "2")
    return train(*CARRY, *flags_of(*WHOLE), *more, "--skip-eval-before-train")


@pytest.fixture(scope="module")
def tool_run(train: Run) -> Path:
    return train(*TOOLS, *flags_of(*CONVERSATION), "--eval-interval", "100", "--skip-eval-before-train")


@pytest.fixture(scope="module")
def megatron_run(train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("megatron.core")
    save = ("--save", str(tmp_path_factory.mktemp("checkpoints")), "--save-interval", "1")
    more = ("--train-backend", "megatron", "--eval-interval", "100", "--skip-eval-before-train")
    return train(*CARRY, *flags_of(*MEGATRON), *save, *more)


def values(run: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(run) if key in line]


def check_calls(run: Path, name: str) -> None:
    summary = read_summary(run)
    assert summary is not None
    counts = summary["hooks"][name]
    assert counts["calls"] > 0 and counts["failures"] == 0


def samples(run: Path) -> list[Sample]:
    return [sample for rollout in range(2) for sample in read_rollouts(run, rollout)]


def kept(run: Path) -> list[Sample]:
    return [sample for rollout in range(2) for sample in read_rollouts(run, rollout, kept_only=True)]


# ---- all of them ---------------------------------------------------------------------------------------------------


def test_there_is_one_for_each_plug_point_and_the_folder_lists_them() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == set(CATALOG)
    listed = re.findall(r"\[([\w]+)\.py\]\((\w+)\.py\)", (FOLDER / "README.md").read_text())
    assert [name for name, _ in listed] == [target for _, target in listed]
    assert sorted(name for name, _ in listed) == sorted(CATALOG)


def hook_of(name: str) -> Hook:
    point = CATALOG[name]
    with contextlib.chdir(ROOT):
        hooks = bind(Namespace(**{point.dest: [path_of(name)] if point.plural else path_of(name)}))
    bound = getattr(hooks, name)
    return bound[0] if point.plural else bound


FORMS = {
    "rollout_function": "data-source",
    "eval_function": "data-source",
    "custom_generate_function": "args-sample-params",
    "custom_rm": "sample",
    "buffer_filter": "live-buffer",
    "rollout_sample_filter": "groups",
    "rollout_all_samples_process": "get-samples",
    "rollout_data_postprocess": "rollout-id",
    "custom_loss_function": "parallel-state",
    "custom_tis_function": "parallel-state",
    "data_source": "class",
    "miles_router_middleware": "class",
    "generate_tool_specs": "list",
}


@pytest.mark.parametrize("name", CATALOG)
def test_it_binds_in_the_form_it_is_written_in(name: str) -> None:
    hook = hook_of(name)
    assert hook.form == FORMS.get(name, "published")
    if hook.source.file is not None:  # a list has no source
        assert Path(hook.source.file).resolve() == FOLDER / f"{name}.py"


@pytest.mark.parametrize("name", CATALOG)
def test_its_command_is_accepted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`miles check` takes its flags without a problem or a warning; what has no caller yet is only bound."""
    program, command, *flags = command_of(name)
    built = FLAGS[CATALOG[name].dest].status.kind != "not_built"
    assert (program, command) == ("miles", "train" if built else "hooks")
    with contextlib.chdir(ROOT):
        assert main(["check" if built else "hooks", *flags]) == 0
    shown = capsys.readouterr().out
    assert CATALOG[name].flag in shown and path_of(name) in shown
    assert "warning" not in shown


def test_every_one_that_is_called_takes_part_in_a_run() -> None:
    called = {name for name in CATALOG if command_of(name)[1] == "train"}
    called.remove("miles_router_middleware")  # it lives in the router's process; requests pass it in a test below
    assert sorted((*POLICY, *WHOLE, *MEGATRON, *CONVERSATION, "custom_agent_function")) == sorted(called)


# ---- a run with the policy loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in POLICY if name != "data_source"])
def test_the_policy_run_called(name: str, policy_run: Path) -> None:
    check_calls(policy_run, name)


def test_the_data_source_made_the_problems(policy_run: Path) -> None:
    first = [s for s in samples(policy_run) if s.group_index is not None and s.group_index < 16]
    assert first and all(s.metadata["digits"] == 1 for s in first)
    for sample in samples(policy_run):
        a, b = sample.prompt.removesuffix("=?").split("+")
        assert int(a) + int(b) == int(sample.label) and len(a) == len(b) == sample.metadata["digits"]


def test_a_resumed_source_goes_on() -> None:
    source = hook_of("data_source")(Namespace(rollout_seed=42, n_samples_per_prompt=2))
    source.get_samples(17)
    again = hook_of("data_source")(Namespace(rollout_seed=42, n_samples_per_prompt=2))
    again.load_state_dict(source.state_dict())
    new, other = source.get_samples(1)[0], again.get_samples(1)[0]
    assert new == other and len(new) == 2 and new[1].index == 35
    source.add_samples([new])
    assert source.get_samples(2)[0] is new


def test_some_responses_are_second_attempts(policy_run: Path) -> None:
    attempts = {sample.metadata.get("attempts", 1) for sample in samples(policy_run)}
    assert attempts == {1, 2}


def test_rewards_are_kept_in_parts(policy_run: Path) -> None:
    rewards = [sample.reward for sample in kept(policy_run)]
    assert all(set(reward) == {"score", "right", "form"} for reward in rewards)
    assert all(reward["score"] == pytest.approx(0.9 * reward["right"] + 0.1 * reward["form"]) for reward in rewards)
    assert len({reward["score"] for reward in rewards}) > 1


def test_groups_that_are_too_alike_are_dropped(policy_run: Path) -> None:
    dropped = [line for line in read_metrics(policy_run) if "rollout/dynamic_filter/drop_too_alike" in line]
    assert dropped
    groups: defaultdict[int | None, list[float]] = defaultdict(list)
    for sample in kept(policy_run):
        groups[sample.group_index].append(sample.reward["score"])
    assert len(groups) == 8
    for scores in groups.values():
        assert 0.2 <= scores.count(max(scores)) / len(scores) <= 0.8


def test_what_was_cut_off_carries_no_loss(policy_run: Path) -> None:
    trained = kept(policy_run)
    assert any(s.status == Sample.Status.TRUNCATED for s in trained)
    assert all(s.remove_sample == (s.status == Sample.Status.TRUNCATED) for s in trained)


def test_unsolved_problems_are_listed(policy_run: Path) -> None:
    rows = [json.loads(line) for line in (policy_run / "unsolved.jsonl").read_text().splitlines()]
    assert rows and all(set(row) == {"prompt", "label", "answers"} and len(row["answers"]) == 4 for row in rows)
    for row in rows:
        assert all(not answer.endswith(f"</think>{row['label']}<eos>") for answer in row["answers"])


def test_weights_of_whole_responses_are_logged(policy_run: Path) -> None:
    """About 1 for each response that is trained; second attempts, drawn at another temperature, are a little off."""
    logged = values(policy_run, "train/response_tis")
    for rollout in range(2):
        trained = [not s.remove_sample for s in read_rollouts(policy_run, rollout, kept_only=True)]
        assert sum(logged[2 * rollout :][:2]) / 2 == pytest.approx(sum(trained) / 16, abs=0.05)
    assert values(policy_run, "train/response_tis_cut") == [0.0] * 4


def test_the_number_of_different_responses_is_logged(policy_run: Path) -> None:
    for rollout, logged in enumerate(values(policy_run, "rollout/different_per_group")):
        trained = read_rollouts(policy_run, rollout, kept_only=True)
        assert logged == len({(s.group_index, s.response) for s in trained}) / 4


# ---- what a metric does not show -----------------------------------------------------------------------------------


def test_only_uncertain_tokens_are_trained() -> None:
    data: dict[str, Any] = {
        "loss_masks": [torch.tensor([1, 1, 0]), torch.tensor([1, 1]), torch.tensor([])],
        "log_probs": [torch.tensor([-0.001, -2.0, -2.0]), torch.tensor([-0.001, -0.002]), torch.tensor([])],
    }
    hook_of("rollout_data_postprocess")(Namespace(), 0, data)
    assert [mask.tolist() for mask in data["loss_masks"]] == [[0, 1, 0], [0, 1], []]


def test_the_baseline_is_the_mean_of_the_others() -> None:
    group = [Sample(group_index=0, reward=r) for r in (1.0, 0.0, 0.0)] + [Sample(group_index=1, reward=3.0)]
    raw, rewards = hook_of("custom_reward_post_process")(Namespace(reward_key=None), group)
    assert raw == [1.0, 0.0, 0.0, 3.0] and rewards == [1.0, -0.5, -0.5, 3.0]


def test_far_off_responses_lose_their_loss() -> None:
    ours = [torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([5.0])]
    lengths = [2, 2, 1]
    loss, masks, metrics = hook_of("custom_tis_function")(
        args=Namespace(), pg_loss=torch.ones(5), train_log_probs=ours, loss_masks=[torch.ones(n) for n in lengths],
        rollout_log_probs=[torch.zeros(n) for n in lengths], total_lengths=lengths, response_lengths=lengths,
        parallel_state=None,
    )  # fmt: skip
    assert loss.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert [mask.tolist() for mask in masks] == [[1.0, 1.0], [1.0, 1.0], [0.0]]
    assert metrics["response_tis_cut"].tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_every_token_weighs_the_same() -> None:
    reduce = hook_of("custom_pg_loss_reducer_function")([9, 9], [1, 3], [torch.ones(1), torch.tensor([1, 1, 0])], False)
    loss = torch.ones(4, requires_grad=True)
    reduce(loss).backward()
    assert loss.grad is not None and loss.grad.tolist() == pytest.approx([1 / 36, 1 / 36, 1 / 36, 0.0])


@pytest.mark.parametrize(
    ("rewards", "reason"), [([1, 1, 1, 1, 1, 0], "too_alike"), ([0] * 5 + [1], "a_lucky_one"), ([0, 1, 1, 0], None)]
)
def test_medium_difficulty(rewards: list[float], reason: str | None) -> None:
    group = [Sample(reward=reward) for reward in rewards]
    verdict = hook_of("dynamic_sampling_filter")(Namespace(reward_key=None), group)
    assert verdict == DynamicFilterOutput(keep=reason is None, reason=reason)


# ---- a run with its own rollout, conversion and loss ---------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_run_called(name: str, whole_run: Path) -> None:
    check_calls(whole_run, name)


def test_what_nobody_solved_is_tried_again(whole_run: Path) -> None:
    first, second = (read_rollouts(whole_run, rollout) for rollout in range(2))
    solved = {s.group_index for s in first if s.reward == 1}
    unsolved = {s.group_index for s in first} - solved
    assert unsolved and values(whole_run, "rollout/unsolved_groups")[0] == len(unsolved)
    again = {s.group_index: s.metadata["attempts"] for s in second if "attempts" in s.metadata}
    assert set(again.values()) == {1} and set(again) <= unsolved
    assert len(again) == 1, "a quarter of four groups"
    assert all(s.response and s.reward is not None for s in second)


def test_the_buffer_gives_out_the_least_tried_first_and_throws_away() -> None:
    def group(attempts: int) -> list[Sample]:
        return [Sample(metadata={"attempts": attempts})]

    tired, tried, fresh = group(3), group(2), group(1)
    buffer = [tired, tried, fresh]
    assert hook_of("buffer_filter")(Namespace(), None, buffer, 4) == [fresh]
    assert buffer == [tried]


def test_a_repeated_response_is_trained_once() -> None:
    def sample(response: str, reward: float) -> Sample:
        fields: dict[str, Any] = {"group_index": 0, "tokens": [1, 2, 3], "response_length": 2}
        return Sample(response=response, reward=reward, rollout_log_probs=[-1.0, -1.0], **fields)

    convert = hook_of("custom_convert_samples_to_train_data")
    data = convert(Namespace(reward_key=None), [sample("a", 1.0), sample("b", 0.0), sample("a", 1.0)])
    assert data["loss_masks"] == [[1, 1], [1, 1], [0, 0]]
    assert data["rewards"] == pytest.approx([1 / 3, -2 / 3, 1 / 3])


def test_the_loss_logs_its_own_metrics(whole_run: Path) -> None:
    assert len(values(whole_run, "train/cispo_loss")) == 4
    assert all(0 <= share <= 1 for share in values(whole_run, "train/cispo_clipped"))
    assert not values(whole_run, "train/pg_loss"), "the built-in loss did not run"


def test_cispo_keeps_the_gradient_of_a_clipped_token() -> None:
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    old = torch.log(torch.tensor([0.2, 0.05]))  # ratios 1 and 4
    batch = {
        "unconcat_tokens": [torch.tensor([1, 2, 3])],
        "total_lengths": [3],
        "response_lengths": [2],
        "advantages": [torch.ones(2)],
        "log_probs": [old],
    }
    settings = Namespace(rollout_temperature=1.0, eps_clip=0.2, eps_clip_high=None)
    loss, metrics = hook_of("custom_loss_function")(settings, None, batch, logits, torch.sum)
    loss.backward()
    assert logits.grad is not None
    first, second = logits.grad[0, 0, 2], logits.grad[0, 1, 3]
    assert second == pytest.approx(1.2 * first) and first < 0
    assert metrics["cispo_clipped"] == 1


def test_the_evaluation_votes(whole_run: Path) -> None:
    (mean,), (vote,) = values(whole_run, "eval/held"), values(whole_run, "eval/held_majority")
    answers = read_rollouts(whole_run, 2, evaluation="held")
    assert len(answers) == 60 and mean == pytest.approx(sum(s.reward for s in answers) / 60)
    assert vote * 12 == pytest.approx(round(vote * 12)) and vote != mean


def test_the_most_frequent_answer_wins() -> None:
    with contextlib.chdir(ROOT):
        majority = load_function("examples/plug_ins/eval_function.py:majority")
    answers = [Sample(response=f"<think>1</think>{n}<eos>") for n in (7, 8, 8, 5)]
    entry = {"prompt_indices": [0, 0, 0, 1], "samples": answers, "rewards": [0.0, 1.0, 1.0, 0.0]}
    assert majority(entry) == {"rewards": [1.0, 0.0]}


def test_accuracy_by_difficulty_is_logged(whole_run: Path) -> None:
    answers = read_rollouts(whole_run, 2, evaluation="held")
    for digits in {len(s.label) for s in answers}:
        rewards = [s.reward for s in answers if len(s.label) == digits]
        assert values(whole_run, f"eval/held/{digits}_digits") == [pytest.approx(sum(rewards) / len(rewards))]


# ---- a run with tools ----------------------------------------------------------------------------------------------


def test_the_calculator_answers(tool_run: Path) -> None:
    assert sum(values(tool_run, "hooks/generate_execute_tool_function/calls")) > 8
    right = [s for s in samples(tool_run) if s.reward == 1 and "<|tool|>" in s.response]
    assert right and all(f"<|tool|>{s.label}<|end|>" in s.response for s in right)


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print(37*48)", "1776"),
        ("3-10", "-7"),
        ("print(__import__('os'))", "error: __import__('os') is no sum"),
        ("print(2**9**9)", "error: 2 ** 9 ** 9 is no sum"),
        ("print(", "error: "),
        (None, "error: expected"),
    ],
)
def test_nothing_but_arithmetic(code: Any, answer: str) -> None:
    run = hook_of("generate_execute_tool_function")
    assert asyncio.run(run.call_async("python", {"code": code})).startswith(answer)


# ---- a run with an agent -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent_run(train: Run) -> Path:
    never = ("--eval-interval", "100", "--skip-eval-before-train")
    return train(*AGENT, *flags_of("custom_agent_function"), *never)


def test_the_agent_asks_twice(agent_run: Path) -> None:
    check_calls(agent_run, "custom_agent_function")
    asked = "<|user|>Check your answer step by step, and correct it if it is wrong.<|end|><|assistant|>"
    for sample in samples(agent_run):
        assert sample.metadata["round_number"] == 2 and sample.response.count(asked) == 1


# ---- a run with Megatron -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEGATRON)
def test_the_megatron_run_called(name: str, megatron_run: Path) -> None:
    check_calls(megatron_run, name)


def test_what_is_frozen_stays_and_the_rest_learns(megatron_run: Path) -> None:
    before = load_file(ROOT / "examples" / "quickstart" / "base" / "model.safetensors")
    after = load_file(megatron_run / "model" / "model.safetensors")
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    frozen = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    assert {name for name in after if name.startswith(frozen)} <= same
    assert {name.split(".")[2] for name in after if name not in same and "layers" in name} == {"2"}


def test_ranks_say_who_computes(megatron_run: Path) -> None:
    printed = (megatron_run / "ranks" / "rank_0.log").read_text()
    assert printed.count("rank 0: the actor computes with ") == 2


# ---- without a caller yet ------------------------------------------------------------------------------------------


def test_the_middleware_times_answers() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(hook_of("miles_router_middleware")(app, router=None))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get("/")

    answer = asyncio.run(get())
    assert answer.text == "here" and float(answer.headers["x-seconds"]) >= 0


def test_the_megatron_hooks_do_what_they_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(2, 2), "head": torch.nn.Linear(2, 2)})
    step = hook_of("custom_megatron_before_train_step_hook")
    step(Namespace(), 9, 0, [model], None, None)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]
    step(Namespace(), 10, 0, [model], None, None)
    assert all(p.requires_grad for p in model.parameters())

    hook_of("custom_megatron_before_log_prob_hook")(Namespace(rank=3), [model], "ref_")
    assert "rank 3: the reference computes with 10 parameters" in caplog.text

    before = torch.get_float32_matmul_precision()
    try:
        hook_of("custom_megatron_init")(Namespace())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)

    hook_of("custom_megatron_post_save_hook")(Namespace(), 4, str(tmp_path / "iter_5"), None)
    newest = json.loads((tmp_path / "newest.json").read_text())
    assert newest == {"rollout": 4, "checkpoint": str(tmp_path / "iter_5"), "hf": None}
