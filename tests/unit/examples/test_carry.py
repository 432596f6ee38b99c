from __future__ import annotations

import asyncio
import json
import random
import time
from argparse import Namespace
from pathlib import Path

import pytest

from examples.quickstart import carry, make_tokenizer
from miles.types import Sample


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_and_heldout_problems_have_nothing_in_common(tmp_path: Path) -> None:
    begin = time.perf_counter()
    carry.write_data(tmp_path)
    assert time.perf_counter() - begin < 0.5
    train, heldout = read(tmp_path / "train.jsonl"), read(tmp_path / "heldout.jsonl")
    prompts = [{row["prompt"] for row in rows} for rows in (train, heldout)]
    assert [len(p) for p in prompts] == [len(train), len(heldout)] == [carry.NUM_TRAIN, 1024]
    assert not prompts[0] & prompts[1]


def test_demonstrations_avoid_the_heldout_problems() -> None:
    shown = {row["messages"][0]["content"] for row in carry.demonstrations(5000)}
    assert not shown & {carry.prompt(a, b) for a, b in carry.heldout_problems()}


def test_the_files_beside_the_example_are_what_the_code_writes(tmp_path: Path) -> None:
    carry.write_data(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (carry.DATA_DIR / name).read_bytes() == (tmp_path / name).read_bytes()


def test_every_problem_needs_a_carry_and_its_label_is_the_sum() -> None:
    for row in carry.rows(carry.heldout_problems()):
        a, b = map(int, row["prompt"].removesuffix("=?").split("+"))
        assert row["label"] == str(a + b)
        assert a % 10 + b % 10 > 9 or a % 100 + b % 100 > 99
        assert carry.solution(a, b, forgets=lambda: True).split("</think>")[1] != row["label"]


@pytest.mark.parametrize(
    ("forgets", "expected"),
    [
        (False, "<think>9+7=16;5+6+1=12;8+4+1=13</think>1326"),
        (True, "<think>9+7=16;5+6=11;8+4=12</think>1216"),
    ],
)
def test_the_problem_of_the_documentation(forgets: bool, expected: str) -> None:
    assert carry.solution(859, 467, forgets=lambda: forgets) == expected


def test_solutions_without_forgetting_are_right() -> None:
    for a, b in carry.heldout_problems():
        assert carry.answer(carry.solution(a, b) + "<eos>") == str(a + b)


def test_demonstrations_parse_and_forget_about_as_often_as_they_should() -> None:
    right = 0
    for row in carry.demonstrations(4000):
        user, assistant = row["messages"]
        a, b = map(int, user["content"].removesuffix("=?").split("+"))
        shown = carry.answer(assistant["content"])
        assert shown is not None and shown.isdecimal() and len(shown) in (3, 4)
        columns = assistant["content"].removeprefix("<think>").split("</think>")[0].split(";")
        assert len(columns) == 3
        for column in columns:
            terms, total = column.split("=")
            assert sum(map(int, terms.split("+"))) == int(total)
        right += shown == str(a + b)
    # 65% of the problems have one carry and 35% have two, each remembered with probability 0.35.
    assert right / 4000 == pytest.approx(0.65 * 0.35 + 0.35 * 0.35**2, abs=0.03)


def test_demonstrations_repeat_themselves() -> None:
    assert carry.demonstrations(50) == carry.demonstrations(100)[:50]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>9+7=16;5+6+1=12;8+4+1=13</think>1326<eos>", 1.0),
        ("<think></think>1326", 1.0),
        ("<think>9+7=16;5+6=11;8+4=12</think>1216<eos>", 0.0),
        ("1326<eos>", 0.0),
        ("<think></think>1326</think>1326<eos>", 0.0),
        ("<think></think>1326 <eos>", 0.0),
        ("<think></think>01326<eos>", 0.0),
        ("<think></think>1326<eos><eos>", 0.0),
        ("", 0.0),
    ],
)
def test_reward(response: str, expected: float) -> None:
    sample = Sample(prompt="859+467=?", response=response, label="1326")
    assert asyncio.run(carry.reward(Namespace(), sample)) == expected


# ---- the tokenizer -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer.save(path)
    return path


def test_encoding_and_decoding_are_exact_inverses(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(make_tokenizer.VOCAB) == 53
    rng = random.Random(0)
    pieces = [token for token in make_tokenizer.VOCAB if token != "<unk>"]
    for _ in range(300):
        chosen = rng.choices(pieces, k=rng.randrange(60))
        ids = tokenizer.encode("".join(chosen))
        assert ids == [make_tokenizer.VOCAB.index(piece) for piece in chosen]
        assert tokenizer.decode(ids) == "".join(chosen)


def test_thinking_survives_skip_special_tokens(folder: Path) -> None:
    tokenizer = make_tokenizer.tokenizer()
    ids = tokenizer.encode("<think>9+7=16</think>1326<eos>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>9+7=16</think>1326"
    assert tokenizer.decode(tokenizer.encode("A\n1")) == "<unk><unk>1"


def test_the_chat_template_leaves_the_prompt_as_it_is(folder: Path) -> None:
    messages = [{"role": "user", "content": "859+467=?"}, {"role": "assistant", "content": "1326"}]
    render = make_tokenizer.tokenizer().apply_chat_template
    assert render(messages[:1], tokenize=False, add_generation_prompt=True) == "859+467=?"
    assert render(messages, tokenize=False) == "859+467=?1326<eos>"


def test_the_random_model_is_as_small_as_promised(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from examples.quickstart.make_base import write_random_model

    write_random_model(tmp_path, seed=0)
    state = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in state.values()) == 597_696
    assert {str(t.dtype) for t in state.values()} == {"torch.bfloat16"}
    assert (tmp_path / "model.safetensors").stat().st_size < 1.25e6
