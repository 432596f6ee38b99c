"""`--rm-type`: which reward scores a sample, what each needs, what is said before the start."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.config import parse
from miles.config import rewards as table
from miles.errors import FlagError, HookError
from miles.rollout import context, rm_hub
from miles.rollout.rm_hub import ifbench, pool, remote
from miles.rollout.rm_hub.f1 import f1_score, normalize_answer
from miles.rollout.rm_hub.gpqa import _extract_letter_from_response, compute_gpqa_reward
from miles.rollout.rm_hub.remote import RemoteRewardError
from miles.types import Sample

BASE = [
    *("--hf-checkpoint", "m", "--num-rollout", "1", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2"),
    *("--global-batch-size", "4"),
]


@functools.cache
def plain() -> Namespace:
    return parse([*BASE, "--prompt-data", "p"])[1]


def arguments(rm_type: str | None = None, **changes: Any) -> Namespace:
    return Namespace(**{**vars(plain()), "rm_type": rm_type, **changes})


def score(rm_type: str | None, response: str, label: Any = None, metadata: Any = None, **changes: Any) -> Any:
    sample = Sample(index=3, prompt="q", response=response, label=label, metadata=metadata)
    return asyncio.run(rm_hub.built_in_rm(arguments(rm_type, **changes), sample))


def test_every_declared_reward_exists_and_is_documented() -> None:
    assert list(rm_hub.REWARDS) == list(table.REWARD_TYPES)
    page = (Path(__file__).resolve().parents[3] / "docs/rewards.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", page, re.MULTILINE))
    assert rows == {n: declared.help.replace("\\boxed{}", "`\\boxed{}`") for n, declared in table.REWARD_TYPES.items()}
    for name in table.REWARD_TYPES:
        assert f'"{name}"' in page, f"docs/rewards.md shows no example of {name}"


@pytest.mark.parametrize("name", [n for n, t in table.REWARD_TYPES.items() if not t.any_value and n != "ifbench"])
def test_rewards_return_what_the_table_says(name: str) -> None:
    value = score(name, "</think> Answer: 7 \\boxed{7}", "7")
    assert (tuple(value) if isinstance(value, dict) else ()) == table.REWARD_TYPES[name].keys


SCORED = [
    ("math", r"\boxed{\frac12}", "0.5", None, 1),
    ("math", r"\boxed{x+1}", "1+x", None, 1),  # needs sympy
    ("math", r"\boxed{x+1}", "x-1", None, 0),
    ("math", "42", "42", None, 0),
    (" math ", r"\boxed{42}", 42, None, 1),
    ("deepscaler", r"</think>\boxed{2x}", "x+x", None, 1),
    ("deepscaler", r"\boxed{2x}", "2x", None, 0),
    ("math_verify", r"It is $\{2,1\}$.", r"\{1,2\}", None, 1),
    ("math_verify", "The answer is 1/2", "0.5", None, 1),
    ("math_verify", "The answer is 1/3", r"\frac{1}{2}", None, 0),
    ("math_verify", r"\boxed{x < 3}", "$x<3$", None, 1),
    ("math_verify", "", 7, None, 0),
    ("math_verify", "<think>7 or 8</think>919<eos>", "919", None, 1),
    ("math_verify", "<think>it is 919</think>7", "919", None, 0),
    ("dapo", "Answer: 34", "34", None, {"score": 1.0, "acc": True, "pred": "34"}),
    ("f1", "the cat sat", "a cat", None, 2 / 3),
    ("gpqa", "The answer is (C).", "C", None, 1.0),
    ("boxed_gpqa", r"not A, not B: \boxed{\text{C}} or D", "C", None, 1.0),
    ("boxed_f1", r"so \boxed{cat}", "cat", None, 1.0),
    ("boxed_f1", "cat", "cat", None, 0.0),
    ("f1", r"\boxed{42}", "42", {"rm_type": "math"}, 1),  # the row wins
    ("f1", "cat", "cat", {"rm_type": ""}, 1.0),
    ("f1", "cat", "cat", ["no dict"], 1.0),
    (None, "cat", "cat", {"rm_type": "f1"}, 1.0),
]


@pytest.mark.parametrize(("rm_type", "response", "label", "metadata", "expected"), SCORED)
def test_scores(rm_type: str | None, response: str, label: Any, metadata: Any, expected: Any) -> None:
    assert score(rm_type, response, label, metadata) == pytest.approx(expected)


def test_boxed_leaves_the_sample_alone() -> None:
    sample = Sample(response=r"so \boxed{cat}", label="cat")
    assert asyncio.run(rm_hub.built_in_rm(arguments("boxed_f1"), sample)) == 1.0
    assert sample.response == r"so \boxed{cat}"


@pytest.mark.parametrize("label", [None, "", " "])
def test_math_verify_without_a_label_is_no_score(label: str | None) -> None:
    with pytest.raises(pool.GraderError, match="ValueError: --rm-type math_verify cannot read the label"):
        score("math_verify", "7", label)


def test_an_undecidable_answer_is_a_failed_score_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.shared(), "limit_s", 0.5)
    endless = r"\boxed{(((((((((9^9)^9)^9)^9)^9)^9)^9)^9)^9)^9x}"
    with pytest.raises(pool.GraderError, match=r"no verdict within 0\.5 s"):
        score("math", endless, "x+1")
    monkeypatch.setattr(pool.shared(), "limit_s", 10.0)
    assert score("math", r"\boxed{x+1}", "1+x") == 1


def test_random_rewards() -> None:
    assert {score("random", "x") for _ in range(64)} == {0, 1}
    same = Sample(index=5, response="abc")
    values = [asyncio.run(rm_hub.built_in_rm(arguments("deterministic_random"), same)) for _ in range(3)]
    assert len(set(values)) == 1 and values[0] in (0, 1)

    def bits(seed: int) -> list[int]:
        args = arguments("deterministic_random", rollout_seed=seed)
        return [asyncio.run(rm_hub.built_in_rm(args, Sample(index=i, response="abc"))) for i in range(200)]

    assert 60 < sum(bits(1)) < 140 and bits(1) == bits(1) != bits(2)


# ---- names ---------------------------------------------------------------------------------------------------------


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(NotImplementedError, match=r"not implemented.*Did you mean math_verify"):
        score("math-verify", "x")
    with pytest.raises(NotImplementedError, match="not specified"):
        score(None, "x")
    for name in ("boxed_", 5, ["f1"]):
        with pytest.raises(NotImplementedError, match="not implemented"):
            score("f1", "x", metadata={"rm_type": name})


def test_the_published_dispatchers() -> None:
    context.install(None)
    try:
        args = arguments("f1")
        assert asyncio.run(rm_hub.async_rm(args, Sample(response="cat", label="cat"), anything=1)) == 1.0
        mixed = [
            Sample(response="cat", label="cat"),
            Sample(response=r"\boxed{7}", label="7", metadata={"rm_type": "math"}),
        ]
        assert asyncio.run(rm_hub.batched_async_rm(args, mixed)) == [1.0, 1]
        assert asyncio.run(rm_hub.batched_async_rm(args, mixed, inplace_set_reward_field=True)) is None
        assert [s.reward for s in mixed] == [1.0, 1]
        with pytest.raises(AssertionError, match="Overriding"):
            asyncio.run(rm_hub.batched_async_rm(args, mixed, inplace_set_reward_field=True))
        with pytest.raises(NotImplementedError, match="not implemented"):
            asyncio.run(rm_hub.async_rm(arguments("nope"), mixed[0]))
        with pytest.raises(NotImplementedError, match="not specified"):
            asyncio.run(rm_hub.async_rm(arguments(None), mixed[0]))
        with pytest.raises(HookError, match="needs a number as label"):
            asyncio.run(rm_hub.async_rm(arguments("dapo", reward_key="score"), Sample(response="x", label="y")))
    finally:
        context.install(None)


ROW = '{"input": "2+2=?", "label": "4"}\n'
BEFORE_THE_START = [
    (["--rm-type", "mth"], "--rm-type: expected the name of a built-in reward, got 'mth'. Did you mean math?"),
    (["--rm-type", "boxed_gpq"], "Did you mean boxed_gpqa?"),
    (["--rm-type", "boxed_math"], "--rm-type boxed_math: it looks for the box or its own marker"),
    (["--rm-type", "boxed_dapo"], "Say dapo."),
    (["--rm-type", "boxed_math_verify"], "Say math_verify."),
    (["--rm-type", "remote_rm"], "--rm-type remote_rm: needs --rm-url"),
    (["--rm-type", "ifbench"], "MILES_IFBENCH_DIR"),
    (["--rm-type", "dapo", "--reward-key", "pred"], "--reward-key: expected one of score, acc, because --rm-type is"),
    (["--rm-type", "math", "--reward-key", "acc"], "--rm-type math: returns a number, which has no entry 'acc'. Leave"),
    ([], "--rm-type: nothing scores the samples of this run."),
    (["--debug-rollout-only"], "--rm-type: nothing scores"),
]


@pytest.mark.parametrize(("flags", "sentence"), BEFORE_THE_START)
def test_refused_before_the_start(
    flags: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(table.IFBENCH_VARIABLE, raising=False)
    data = tmp_path / "d.jsonl"
    data.write_text(ROW)
    with pytest.raises(FlagError) as caught:
        parse([*BASE, "--prompt-data", str(data), *flags])
    assert sentence in str(caught.value)


ACCEPTED: list[tuple[list[str], str]] = [
    (["--rm-type", "boxed_f1"], ROW),
    (["--rm-type", "dapo", "--reward-key", "acc"], ROW),
    (["--rm-type", "remote_rm", "--rm-url", "http://127.0.0.1:1", "--reward-key", "anything"], ROW),
    (["--rm-type", "math", "--reward-key", "x", "--custom-generate-function-path", "a.b"], ROW),
    (["--rm-type", "mth", "--custom-rm-path", "a.b"], ROW),  # with a notice that it has no meaning
    (["--custom-generate-function-path", "a.b"], ROW),
    (["--rollout-function-path", "a.b"], ROW),
    (["--loss-type", "sft_loss"], ROW),
    (["--load-debug-rollout-data", "d/{rollout_id}.pt"], ROW),
    ([], '{"input": "2+2=?", "label": "4", "metadata": {"rm_type": "math"}}\n'),
]


@pytest.mark.parametrize(("flags", "rows"), ACCEPTED)
def test_accepted(flags: list[str], rows: str, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(rows)
    parse([*BASE, "--prompt-data", str(data), *flags])


def test_a_reward_beside_a_plug_in_has_no_meaning() -> None:
    config, _ = parse([*BASE, "--prompt-data", "p", "--rm-type", "f1", "--custom-rm-path", "a.b"])
    assert "--rm-type: no meaning here, --custom-rm-path scores the samples." in config.notices


def test_dapo_trains_on_its_score_unless_told_otherwise() -> None:
    config, args = parse([*BASE, "--prompt-data", "p", "--rm-type", "dapo"])
    assert (args.reward_key, args.eval_reward_key) == ("score", "score")
    assert "--rm-type dapo: --reward-key score is assumed; this reward is a dict." in config.notices


EVAL = """
datasets:
- {name: a, path: a.jsonl, rm_type: %s}
"""


@pytest.mark.parametrize(
    ("flags", "rm_type", "sentence"),
    [
        (["--rm-type", "math"], "mth", "--eval-config, evaluation set 'a': rm_type: expected the name of a built-in"),
        (["--rm-type", "dapo"], "math", "'a': rm_type math: returns a number, which has no entry 'score'"),
        (["--rm-type", "math"], "dapo", ""),
        (["--rm-type", "math"], "f1", ""),
        (["--rm-type", "math", "--eval-reward-key", "acc"], "f1", "Leave --eval-reward-key out."),
    ],
)
def test_rewards_of_evaluation_sets(flags: list[str], rm_type: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(EVAL % rm_type)
    line = [*BASE, "--prompt-data", "p", "--eval-interval", "1", "--eval-config", str(tmp_path / "e.yaml"), *flags]
    if sentence:
        with pytest.raises(FlagError) as caught:
            parse(line)
        assert sentence in str(caught.value)
    else:
        _, args = parse(line)
        assert (args.reward_key, args.eval_reward_key) == (None, "score" if rm_type == "dapo" else None)


# ---- f1 and gpqa ---------------------------------------------------------------------------------------------------

F1 = [
    ("the cat sat", "a cat", (2 / 3, 0.5, 1.0)),
    ("cat", "cat", (1.0, 1.0, 1.0)),
    ("The Cat!", "cat", (1.0, 1.0, 1.0)),
    ("cat cat", "cat", (2 / 3, 0.5, 1.0)),
    ("dog", "cat", (0.0, 0.0, 0.0)),
    ("", "cat", (0.0, 0.0, 0.0)),
    (None, "cat", (0.0, 0.0, 0.0)),
    ("cat", None, (0.0, 0.0, 0.0)),
    ("yes", "yes", (1.0, 1.0, 1.0)),
    ("yes it is", "yes", (0.0, 0.0, 0.0)),
    ("no", "yes no", (0.0, 0.0, 0.0)),
    ("noanswer", "cat", (0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("prediction", "truth", "expected"), F1)
def test_f1(prediction: str | None, truth: str | None, expected: tuple[float, float, float]) -> None:
    assert f1_score(prediction, truth) == pytest.approx(expected)
    assert normalize_answer("The  quick, brown-fox; an A.") == "quick brownfox"


@pytest.mark.parametrize("label", [7, ["cat", "dog"]])
def test_an_f1_label_that_is_no_text(label: Any) -> None:
    if isinstance(label, int):
        assert score("f1", "7", label) == 1.0
    else:
        with pytest.raises(TypeError, match="--rm-type f1 needs a text as label"):
            score("f1", "7", label)


LETTERS = [
    ("The answer is A", "A"),
    ("answer: b", "B"),
    ("Answer: (C)", "C"),
    ("The answer is **D**.", "D"),
    (r"The answer is \boxed{C}", "C"),
    (r"answer is $\text{B}$", "B"),
    ("final answer: D", "D"),
    ("Final option: D", "D"),
    ("Option A is correct.", "A"),
    ("The correct choice is B", "B"),
    ("I think C is the correct one", "C"),
    ("I choose option C", "C"),
    ("C", "C"),
    ("It could be A. No, B", "B"),
    ("<think>answer: A</think> B", "B"),
    ("Option A is wrong, so the answer is C.", "C"),
    ("The answer is C. Option A is wrong.", "C"),
    ("Answer: A. Wait. Answer: D", "D"),
    ("the answer depends on the mass", None),
    ("the answer is a number", None),
    ("the answer is a.", "A"),
    ("The answer is Z", None),
    ("answer is E", None),  # not one of A to D
    ("I do not know", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "letter"), LETTERS)
def test_letters(response: str, letter: str | None) -> None:
    assert _extract_letter_from_response(response, ["A", "B", "C", "d"]) == letter


CITIES = ["Paris", "London", "New York", "Rome"]
GPQA: list[tuple[str | None, Any, dict[str, Any] | None, float]] = [
    (None, "A", None, 0.0),
    ("The answer is H", "H", None, 1.0),
    ("The answer is G", "H", None, 0.0),  # A to H without choices
    ("The answer is I", "B", None, 0.0),
    ("The answer is B", "A", {"correct_letter": "b"}, 1.0),
    ("The answer is C", 2, {"choices": CITIES}, 1.0),
    ("The answer is A", 2.0, {"choices": CITIES, "correct_letter": "A"}, 0.0),  # the index wins
    ("The answer is C", "new york!", {"choices": CITIES}, 1.0),
    ("It must be New York", "C", {"choices": CITIES}, 1.0),
    ("It must be Rome", "C", {"choices": CITIES}, 0.0),
    ("the answer is b", "B", {"choices": {"A": "x", "B": "y"}}, 1.0),
    ("the answer is C", "B", {"choices": {"A": "x", "B": "y"}}, 0.0),
    ("It is y of course", None, {"choices": {"A": "x", "B": "y"}, "correct_letter": "B"}, 1.0),
    ("The answer is E", "E", {"valid_letters": ["E", "F"]}, 1.0),
    ("the value is 42 metres", "Z", {"correct_answer": "42 metres"}, 1.0),
    ("the value is 142 metres", "Z", {"answer_text": "42 metres"}, 0.0),
    ("about nothing", "B", None, 0.0),  # a bare letter is no text to look for
    ("", "", None, 0.0),
    ("anything", None, None, 0.0),
    ("anything", 99, None, 0.0),
    ("anything", ["list"], {"choices": 5 * ["x"], "valid_letters": None}, 0.0),
]


@pytest.mark.parametrize(("response", "label", "metadata", "expected"), GPQA)
def test_gpqa(response: str | None, label: Any, metadata: dict[str, Any] | None, expected: float) -> None:
    assert compute_gpqa_reward(response, label, metadata) == expected


@given(st.text(alphabet="answerioptch :*({[$\"'`\\\nABCa.", max_size=300), st.text(max_size=5))
def test_gpqa_reads_any_text(response: str, label: str) -> None:
    assert compute_gpqa_reward(response * 20, label, {"choices": [label, "x"]}) in (0.0, 1.0)


# ---- ifbench, with a library of IFBench's interface ------------------------------------------------------------------

EVALUATION_LIB = '''
import dataclasses
from instructions_registry import INSTRUCTION_DICT
@dataclasses.dataclass
class InputExample:
    key: int
    instruction_id_list: list
    prompt: str
    kwargs: list
@dataclasses.dataclass
class OutputExample:
    instruction_id_list: list
    prompt: str
    response: str
    follow_all_instructions: bool
    follow_instruction_list: list
def test_instruction_following_strict(inp, prompt_to_response):
    response = prompt_to_response[inp.prompt]
    print("graders may print")
    followed = []
    for index, name in enumerate(inp.instruction_id_list):
        instruction = INSTRUCTION_DICT[name](name)
        instruction.build_description(**inp.kwargs[index])
        followed.append(bool(response.strip()) and instruction.check_following(response))
    return OutputExample(inp.instruction_id_list, inp.prompt, response, all(followed), followed)
'''
REGISTRY = '''
class Words:
    def __init__(self, name): pass
    def build_description(self, num_words=1): self.num_words = num_words
    def check_following(self, value): return len(value.split()) >= self.num_words
class Lower(Words):
    def build_description(self): pass
    def check_following(self, value): return value == value.lower()
INSTRUCTION_DICT = {"count:words": Words, "format:lower": Lower}
'''
INSTRUCTIONS = {
    "instruction_id_list": ["count:words", "format:lower"],
    "kwargs": [{"num_words": 3, "relation": None}, {"relation": None}],
    "prompt_text": "Write.",
    "record_id": "17",
}


@pytest.fixture
def ifbench_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "evaluation_lib.py").write_text(EVALUATION_LIB)
    (tmp_path / "instructions_registry.py").write_text(REGISTRY)
    monkeypatch.setenv(table.IFBENCH_VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    pool.shared().close()  # workers inherit the environment
    yield tmp_path
    pool.shared().close()
    ifbench._load_evaluation_lib.cache_clear()
    for name in ("evaluation_lib", "instructions_registry"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("ifbench_folder")
def test_ifbench_scores() -> None:
    metadata = {**INSTRUCTIONS, "not_json": object()}
    assert score("ifbench", "one two three", metadata=metadata) == 1.0
    assert score("ifbench", "one two", metadata=metadata) == 0.0
    assert score("ifbench", "one two THREE", metadata=metadata) == 0.0
    assert score("boxed_ifbench", r"X \boxed{one two three}", metadata=metadata) == 1.0
    with pytest.raises(pool.GraderError, match="KeyError: 'count:apples'"):
        score("ifbench", "x", metadata={"instruction_id_list": ["count:apples"]})
    with pytest.raises(pool.GraderError, match="needs metadata with an instruction_id_list; this row has no metadata"):
        score("ifbench", "x")
    assert parse([*BASE, "--prompt-data", "p", "--rm-type", "ifbench"])[1].rm_type == "ifbench"


@pytest.mark.usefixtures("ifbench_folder")
def test_ifbench_called_directly() -> None:
    assert ifbench.compute_ifbench_reward("one two three", None, INSTRUCTIONS) == 1.0
    assert ifbench.compute_ifbench_reward(None, None, INSTRUCTIONS) == 0.0
    assert ifbench.InputExample is ifbench.evaluation_lib.InputExample
    with pytest.raises(AttributeError):
        _ = ifbench.nothing


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (None, [{}, {}]),
        ({"n": 1, "m": None}, [{"n": 1}, {"n": 1}]),
        ([{"n": 1}], [{"n": 1}, {"n": 1}]),
        ([{"n": 1}, None], [{"n": 1}, {}]),
        ([{}, {"n": 2}, {"n": 3}], [{}, {"n": 2}]),
        ([], [{}, {}]),
    ],
)
def test_ifbench_has_kwargs_per_instruction(kwargs: Any, expected: list[dict[str, int]]) -> None:
    example = ifbench.input_example({"instruction_id_list": ["a", None, " b ", ""], "kwargs": kwargs})
    assert example == {"key": 0, "instruction_id_list": ["a", "b"], "prompt": "", "kwargs": expected}


def test_ifbench_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(table.IFBENCH_VARIABLE, raising=False)
    with pytest.raises(FlagError, match=r"git clone https://github\.com/allenai/IFBench"):
        score("ifbench", "x", metadata=INSTRUCTIONS)
    monkeypatch.setenv(table.IFBENCH_VARIABLE, str(tmp_path))
    with pytest.raises(FlagError, match=r"has no evaluation_lib\.py"):
        score("ifbench", "x", metadata=INSTRUCTIONS)


# ---- remote_rm, against a server -------------------------------------------------------------------------------------


class _Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: ClassVar[list[dict[str, Any]]]
    answer: ClassVar[tuple[int, bytes]]
    delay: ClassVar[threading.Event]

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.answer[0] == 0:
            self.delay.wait(5)
        self.send_response(self.answer[0] or 200)
        self.send_header("Content-Length", str(len(self.answer[1])))
        self.end_headers()
        self.wfile.write(self.answer[1])

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    _Server.received, _Server.answer, _Server.delay = [], (200, b"0.5"), threading.Event()
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/score"
    _Server.delay.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(("body", "value"), [(b"0.5", 0.5), (b'{"score": 1, "why": "x"}', {"score": 1, "why": "x"})])
def test_remote_rm(server: str, body: bytes, value: Any) -> None:
    _Server.answer = (200, body)
    assert score("boxed_remote_rm", r"a \boxed{b}", "l", rm_url=server) == value
    assert _Server.received == [{"prompt": "q", "response": r"a \boxed{b}", "label": "l"}], "the whole response"


def test_remote_rm_scores_many_at_once_on_open_connections(server: str) -> None:
    async def many() -> list[Any]:
        args = arguments("remote_rm", rm_url=server)
        return await asyncio.gather(*(rm_hub.remote_rm(args, Sample(prompt="q", response=str(i))) for i in range(50)))

    assert asyncio.run(many()) == [0.5] * 50
    assert asyncio.run(many()) == [0.5] * 50, "another event loop"


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (500, b"out of memory", "answered 500: out of memory"),
        (404, b"", "answered 404"),
        (302, b"", "answered 302"),
        (200, b"one", "expected a number or an object as JSON, got 'one'"),
        (200, b"", "expected a number or an object as JSON, got ''"),
    ],
)
def test_remote_rm_that_refuses_is_no_score(server: str, status: int, body: bytes, sentence: str) -> None:
    _Server.answer = (status, body)
    with pytest.raises(RemoteRewardError, match=sentence):
        score("remote_rm", "x", rm_url=server)


def test_remote_rm_that_never_answers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _Server.answer = (0, b"1")
    monkeypatch.setattr(remote, "ANSWER_LIMIT_S", 0.2)
    with pytest.raises(RemoteRewardError, match=r"did not answer within 0\.2 s"):
        score("remote_rm", "x", rm_url=server)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "127.0.0.1:9", "nowhere", "http://[", None])
def test_remote_rm_at_an_address_that_is_none(url: str | None) -> None:
    with pytest.raises(RemoteRewardError, match="--rm-url"):
        score("remote_rm", "x", rm_url=url)
