"""The tiny tool model: its lessons, its tokenizer, and that the recipe which made it still runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tool_runs import BASE, TOKENIZER
from transformers import AutoTokenizer

from examples.tiny_tools import facts, lessons, make_base
from miles.rollout.loss_mask import MultiTurnLossMaskGenerator

MASKS = MultiTurnLossMaskGenerator(TOKENIZER, "template")
MEGABYTE = 2**20


def test_the_files_beside_the_example_are_what_the_code_writes() -> None:
    for path, content in lessons.files().items():
        assert path.read_text(encoding="utf-8") == content, path


def test_the_shipped_tokenizer_is_the_one_of_the_code() -> None:
    shipped = AutoTokenizer.from_pretrained(BASE)
    assert shipped.get_vocab() == TOKENIZER.get_vocab()
    assert shipped.chat_template == TOKENIZER.chat_template
    text = "<think>é\n日本</think><|end|>"
    assert shipped.encode(text) == TOKENIZER.encode(text)


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_tags_survive_where_control_tokens_are_skipped() -> None:
    ids = TOKENIZER.encode("<search>x</search><|end|>")
    assert len(ids) == 4
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<search>x</search>"


def learned(kind, seed: int = 0) -> tuple[str, list[str]]:
    lesson = kind(random.Random(seed))
    ids, mask = MASKS.get_loss_mask(lesson["messages"], lesson.get("tools"))
    assert len(ids) == len(mask) < 200
    return TOKENIZER.decode(ids), MASKS.get_text_from_loss_mask(ids, mask)


@pytest.mark.parametrize("kind", lessons.LESSONS)
@pytest.mark.parametrize("seed", range(20))
def test_lessons_teach_what_the_assistant_says_and_nothing_else(kind, seed: int) -> None:
    text, said = learned(kind, seed)
    assert said[-1].endswith("</answer><|end|>")
    for piece in said:
        assert "<information>" not in piece and "<|tool|>" not in piece and "<|user|>" not in piece
        text = text.replace(piece, "", 1)
    assert "<answer>" not in text and "<search>" not in text and "<tool_call>" not in text


def test_a_tool_call_and_its_result_are_rendered_as_the_built_in_conversation_sees_them() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "python", "arguments": '{"code": "print(1)"}'}}
    messages = [lessons.user("1=?"), {**lessons.assistant(""), "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    text = TOKENIZER.apply_chat_template(messages, tools=[lessons.PYTHON], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>python(code)<|end|><|user|>1=?<|end|><|assistant|>"
        '<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call><|end|>'
        "<|tool|>1<|end|><|assistant|>"
    )


def test_the_search_lessons_do_not_give_the_answers_away() -> None:
    """Names are paired at random, so that a model which answers without searching is mostly wrong."""
    shown = [lesson for lesson in lessons.lessons(2000) if "<information>" in lesson["messages"][-1]["content"]]
    true = [sentence for sentence in facts.corpus() if any(sentence in s["messages"][-1]["content"] for s in shown)]
    right = sum(any(sentence in s["messages"][-1]["content"] for sentence in true) for s in shown)
    assert len(shown) > 300 and right / len(shown) < 0.15


def test_lessons_are_the_same_every_time() -> None:
    assert lessons.lessons(50) == lessons.lessons(50)
    assert json.loads(lessons.jsonl(lessons.lessons(1))) == lessons.lessons(1)[0]


def test_the_recipe_runs_and_the_shipped_model_has_its_shape(tmp_path: Path) -> None:
    make_base.make_base(tmp_path / "base", tmp_path / "work", num_steps=1)
    made, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", BASE))
    assert {name: t.shape for name, t in made.items()} == {name: t.shape for name, t in shipped.items()}
    assert sum(t.numel() for t in shipped.values()) == 822_656
    random_weights = load_file(tmp_path / "work" / "random" / "model.safetensors")
    assert any(not t.equal(random_weights[name]) for name, t in made.items())
    assert {p.name for p in (tmp_path / "base").iterdir()} == {p.name for p in BASE.iterdir()}
    assert sum(p.stat().st_size for p in BASE.iterdir()) < 2 * MEGABYTE
