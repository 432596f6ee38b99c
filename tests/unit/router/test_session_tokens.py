"""Token-in token-out: a later turn begins with the exact tokens of an earlier one, whatever its text would become."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_templates import CHATML, HEADERS, PLAIN, THINKING, byte_tokenizer

from miles.rollout.generate_utils.chat_template import render
from miles.router.session.naive_trajectory import NaiveTrajectoryManager, TooManySessionsError
from miles.router.session.session_types import SessionRecord

TOKENIZERS = {
    "chatml": byte_tokenizer(CHATML),
    "thinking": byte_tokenizer(THINKING),
    "headers": byte_tokenizer(HEADERS, eos="<|eot_id|>"),
    "other-eos": byte_tokenizer(CHATML, eos="<|endoftext|>"),
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def record(request: dict[str, Any], ids: list[int], output: list[int], message: dict[str, Any]) -> SessionRecord:
    content = [{"token_id": token, "logprob": -0.5} for token in output]
    choice = {"message": message, "input_token_ids": ids, "logprobs": {"content": content}}
    return SessionRecord(
        timestamp=0.0, method="POST", path="/v1/chat/completions", request=request, response={"choices": [choice]},
        status_code=200,
    )  # fmt: skip


class Talk:
    """A session that plays engine and agent."""

    def __init__(self, tokenizer: Any, **request: Any) -> None:
        self.tokenizer, self.request = tokenizer, request
        self.manager = NaiveTrajectoryManager(Namespace(), tokenizer)
        self.session = self.manager.create_session()
        self.messages: list[dict[str, Any]] = []
        self.ids: list[int] = []  # prompt and output of the last turn

    def ask(self, *messages: dict[str, Any]) -> tuple[list[int], int] | None:
        """What a request with these further messages begins with."""
        self.messages = [*self.messages, *messages]
        return self.manager.reused_tokens(self.session, {**self.request, "messages": self.messages})

    def answer(self, prompt: list[int], output: list[int], **message: Any) -> None:
        said = {"role": "assistant", **message}
        self.manager.append_session_record(
            self.session, record({**self.request, "messages": self.messages}, prompt, output, said)
        )
        self.messages = [*self.messages, said]
        self.ids = prompt + output

    def fresh(self) -> list[int]:
        return render(self.tokenizer, self.messages, tools=self.request.get("tools"))

    def text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids)
        return text


words = st.text(st.sampled_from("abc {}\"'\n<>/éß日𠮷"), max_size=12)
# What an engine may have sampled: any tokens, not only those that a tokenizer would make of their text.
sampled = st.lists(st.integers(0, 255).map(lambda i: i + 6), max_size=10)
turns = st.lists(
    st.tuples(sampled, st.sampled_from(["eos", "cut"]), st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=5
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(first=words, turns=turns)
@settings(max_examples=40, deadline=None)
def test_every_prompt_is_the_recorded_tokens_and_what_is_new(name: str, first: str, turns: Any) -> None:
    tokenizer = TOKENIZERS[name]
    end = "<|eot_id|>" if name == "headers" else "<|im_end|>"
    end_id = tokenizer.convert_tokens_to_ids(end)
    talk = Talk(tokenizer)
    assert talk.ask(user(first)) is None
    prompt = talk.fresh()
    for said, how, questions in turns:
        output = [*said, end_id] if how == "eos" else said
        talk.answer(prompt, output, content=tokenizer.decode(said))
        reused = talk.ask(*(user(question) for question in questions))
        assert reused is not None
        prompt, count = reused
        assert prompt[:count] == talk.ids and count == len(talk.ids)
        assert tokenizer.decode(prompt[count:]) == expected(name, "" if how == "eos" else end, questions)


def expected(name: str, end: str, questions: list[str]) -> str:
    """What the template writes behind an answer, said without it."""
    if name == "headers":
        return (
            end
            + "".join(f"<|header|>user<|header|>\n{q.strip()}<|eot_id|>" for q in questions)
            + ("<|header|>assistant<|header|>\n")
        )
    return end + "\n" + "".join(f"<|im_start|>user\n{q}<|im_end|>\n" for q in questions) + "<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["chatml", "headers"])
def test_a_canonical_conversation_is_rendered_as_ever(name: str) -> None:
    """Where the sampled tokens are those of their text and nothing is rewritten, reuse changes nothing."""
    tokenizer = TOKENIZERS[name]
    talk = Talk(tokenizer, tools=TOOLS)
    talk.ask(user("1+2?"))
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    said = {"content": "", "tool_calls": [call]}
    prompt = talk.fresh()
    whole = tokenizer.apply_chat_template(
        [*talk.messages, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "add", "arguments": {"a": 1}}}]}], tokenize=False, tools=TOOLS,
    )  # fmt: skip
    ids = tokenizer.encode(whole.removesuffix("\n"), add_special_tokens=False)
    talk.answer(prompt, ids[len(prompt) :], **said)
    reused = talk.ask({"role": "tool", "tool_call_id": "c", "content": "3"}, user("sure?"))
    assert reused == (talk.fresh(), len(ids))


def test_thoughts_that_the_template_drops_stay_in_the_tokens() -> None:
    tokenizer = TOKENIZERS["thinking"]
    talk = Talk(tokenizer)
    talk.ask(user("hi"))
    thought = tokenizer.encode("<think>so</think>yes<|im_end|>", add_special_tokens=False)
    talk.answer(talk.fresh(), thought, content="<think>so</think>yes")
    reused = talk.ask(user("sure?"))
    assert reused is not None and "<think>so" in talk.text(reused[0]) and "<think>so" not in talk.text(talk.fresh())


def test_settings_of_the_template_count_for_what_is_new() -> None:
    talk = Talk(TOKENIZERS["thinking"], chat_template_kwargs={"enable_thinking": False})
    talk.ask(user("hi"))
    talk.answer(talk.fresh(), [9, 2], content="x")
    reused = talk.ask(user("sure?"))
    assert reused is not None and talk.text(reused[0]).endswith("assistant\n<think></think>")


def recorded() -> Talk:
    talk = Talk(TOKENIZERS["chatml"], tools=TOOLS)
    talk.ask(user("hi"))
    talk.answer(talk.fresh(), [9, 9, 2], content="yo", tool_calls=None)
    return talk


def reuse(talk: Talk, messages: list[dict[str, Any]], **request: Any) -> bool:
    given = {**talk.request, **request, "messages": messages}
    return talk.manager.reused_tokens(talk.session, given) is not None


@pytest.mark.parametrize(
    "echo",
    [
        {"content": "yo"},
        {"content": [{"type": "text", "text": "yo"}], "tool_calls": []},
        {"content": "yo", "refusal": None, "annotations": None, "audio": None, "function_call": None},
        {"content": "yo", "reasoning_content": "hm"},
    ],
)
def test_an_answer_is_known_again_however_clients_write_it(echo: dict[str, Any]) -> None:
    talk = recorded()
    assert reuse(talk, [user("hi"), {"role": "assistant", **echo}, user("?")])


@pytest.mark.parametrize(
    ("messages", "request_"),
    [
        ([user("hi"), {"role": "assistant", "content": "yo!"}, user("?")], {}),
        ([user("ho"), {"role": "assistant", "content": "yo"}, user("?")], {}),
        ([user("hi"), {"role": "assistant", "content": "yo"}], {}),
        ([user("hi"), {"role": "assistant", "content": "yo"}, user("?")], {"tools": None}),
        ([user("hi"), {"role": "assistant", "content": "yo"}, user("?")], {"tool_choice": "none"}),
        ([user("hi"), {"role": "assistant", "content": "yo"}, user("?")], {"chat_template_kwargs": {"x": 1}}),
    ],
)
def test_another_conversation_is_rendered_anew(messages: list[dict[str, Any]], request_: dict[str, Any]) -> None:
    assert not reuse(recorded(), messages, **request_)


def test_the_longest_turn_counts_and_branches_are_kept_apart() -> None:
    talk = recorded()
    first = talk.ids
    before = talk.messages
    prompt, _ = talk.ask(user("left")) or ([], 0)
    talk.answer(prompt, [10, 2], content="l")
    left, left_ids = talk.messages, talk.ids
    talk.messages = before
    prompt, count = talk.ask(user("right")) or ([], 0)
    assert count == len(first)
    talk.answer(prompt, [11, 2], content="r")
    talk.messages = left
    reused = talk.ask(user("on"))
    assert reused is not None and reused[0][: reused[1]] == left_ids


def test_a_template_without_an_end_of_turn_is_rendered_anew() -> None:
    talk = Talk(byte_tokenizer(PLAIN))
    talk.ask(user("hi"))
    talk.answer(talk.fresh(), [9], content="x")
    assert talk.ask(user("?")) is None


def test_an_answer_that_contains_the_mark_is_no_trap() -> None:
    talk = Talk(TOKENIZERS["chatml"])
    talk.ask(user("milesanswerstandshere and milesanswerstandsheree"))
    talk.answer(talk.fresh(), [9, 2], content="x")
    reused = talk.ask(user("milesanswerstandshere"))
    assert reused is not None and talk.text(reused[0][reused[1] :]).count("milesanswerstandshere") == 1


# ---- how many sessions there are -------------------------------------------------------------------------------------


def test_unknown_sessions_are_answered_with_none() -> None:
    manager = NaiveTrajectoryManager(Namespace(), TOKENIZERS["chatml"])
    assert manager.get_session_records_by_id("x") is None and manager.delete_session_by_id("x") is None
    assert manager.append_session_record("x", record({}, [], [], {})) is None
    assert manager.calc_prompt_tokens("x", [user("hi")]) is None and manager.begin("x") is None


def test_sessions_are_forgotten_when_idle_and_never_with_a_request_in_flight() -> None:
    now = 0.0
    manager = NaiveTrajectoryManager(Namespace(), None, max_sessions=3, idle_s=10.0, clock=lambda: now)
    idle, busy, used = (manager.create_session() for _ in range(3))
    with pytest.raises(TooManySessionsError, match="3 sessions are open"):
        manager.create_session()
    manager.begin(busy)
    now = 6.0
    assert manager.get_session_records_by_id(used) == []
    now = 12.0
    new = manager.create_session()
    assert set(manager.sessions) == {busy, used, new} and idle not in manager.sessions
    manager.end(busy)
    assert manager.delete_session_by_id(busy) is True and busy not in manager.sessions
