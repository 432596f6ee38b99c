from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from examples.quickstart import make_tokenizer
from miles.errors import DataError, FlagError
from miles.rollout.dataset import Dataset, filter_long_prompt, prompt_lengths, read_file
from miles.rollout.multimodal import MediaKeys
from miles.types import Sample

TOKENIZER = make_tokenizer.tokenizer()
ROWS = [{"text": f"{i}+{i}=?", "answer": str(2 * i)} for i in range(5)]


def jsonl(folder: Path, rows: list[object], name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, max_length: int | None = None, **kwargs: object) -> Dataset:
    return Dataset(path, TOKENIZER, None, max_length, **kwargs)


# ---- reading -----------------------------------------------------------------------------------------------------


def test_jsonl_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n   \n{"a": "\u2028"}', encoding="utf-8")
    assert list(read_file(str(path))) == [{"a": 1}, {"a": "\u2028"}]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    rows = [{"text": "1+1=?", "answer": "2", "tools": [{"name": "f"}]}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert list(read_file(str(path))) == rows
    assert list(read_file(f"{path}@[1:2]")) == rows[1:2]


@pytest.mark.parametrize(
    ("suffix", "kept"),
    [("@[1:3]", [1, 2]), ("@[:2]", [0, 1]), ("@[3:]", [3, 4]), ("@[:]", [0, 1, 2, 3, 4]), ("@[4:9]", [4])],
)
def test_slices(tmp_path: Path, suffix: str, kept: list[int]) -> None:
    assert list(read_file(jsonl(tmp_path, ROWS) + suffix)) == [ROWS[i] for i in kept]


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b'{"text": "a"}\n\n{"text": \n', 3, "expected a JSON object, got '{\"text\":'"),
        (b'{"text": "a"}\n"hello"\n', 2, "expected a JSON object like"),
        (b"[1, 2]\n", 1, "got '[1, 2]'"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', 2, "expected text in UTF-8, got byte 0xff at column 11"),
        (b'{"text": "a"}\n{"q": 1, "a": 2}\n', 2, "--input-key text: no such key in this row; its keys: 'q', 'a'."),
        (b'{"text": null}\n', 1, "--input-key text: expected a string or a list of messages"),
        (b'{"text": ["a", "b"]}\n', 1, "--input-key text: expected a string or a list of messages"),
        (b'{"text": "a", "metadata": 3}\n', 1, "--metadata-key metadata: expected an object"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, line: int, said: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(str(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert said in str(caught.value)


def test_bad_lines_outside_of_the_slice_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('oops\n{"text": "1"}\noops\n')
    assert load(f"{path}@[1:2]")[0].prompt == "1"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.jsonl", "no such file"),
        ("folder.jsonl", "is a folder"),
        ("data.csv", "ends in .jsonl or .parquet, got '.csv'"),
        ("empty.jsonl", "the data set is empty"),
        ("blank.jsonl", "the data set is empty"),
        ("broken.parquet", "not readable as a Parquet file"),
        ("good.jsonl@[-2:]", "counts from the end"),
        ("good.jsonl@[1:]", "the data set is empty"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for file, text in [("data.csv", "a"), ("empty.jsonl", ""), ("blank.jsonl", "\n \n"), ("broken.parquet", "PAR1")]:
        (tmp_path / file).write_text(text)
    (tmp_path / "good.jsonl").write_text('{"text": "1"}\n')
    with pytest.raises(DataError, match=r"jsonl|csv|parquet") as caught:
        load(str(tmp_path / name))
    assert said in str(caught.value)


def test_a_missing_label_key_names_its_flag(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:1: --label-key gold: .* 'text', 'answer'"):
        load(jsonl(tmp_path, ROWS), label_key="gold")


# ---- samples -----------------------------------------------------------------------------------------------------


def test_prompt_label_metadata_and_tools(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"q": "1", "a": {"x": 1}, "m": {"level": 2}, "t": json.dumps(tools)}, {"q": "2", "a": 3, "t": None}]
    data = load(jsonl(tmp_path, rows), prompt_key="q", label_key="a", metadata_key="m", tool_key="t")
    assert [s.prompt for s in data.samples] == ["1", "2"]
    assert [s.label for s in data.samples] == [{"x": 1}, 3]
    assert [s.metadata for s in data.samples] == [{"level": 2, "tools": tools}, {}]


def test_chat_template_renders_strings_and_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]
    data = load(jsonl(tmp_path, [{"text": "1+1=?"}, {"text": messages}]), apply_chat_template=True)
    assert [s.prompt for s in data.samples] == ["1+1=?", "1+1=?2<eos>"]
    assert load(jsonl(tmp_path, [{"text": messages}]))[0].prompt == messages


def test_a_tokenizer_without_chat_template_names_the_flag(tmp_path: Path) -> None:
    tokenizer = make_tokenizer.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(FlagError, match="--apply-chat-template: the tokenizer of --hf-checkpoint has no chat template"):
        Dataset(jsonl(tmp_path, ROWS), tokenizer, None, None, apply_chat_template=True)


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:2: the chat template cannot render this prompt"):
        load(jsonl(tmp_path, [{"text": "1"}, {"text": [{"content": 3}]}]), apply_chat_template=True,
             apply_chat_template_kwargs={"chat_template": "{{ messages[0]['content'] | length }}"})  # fmt: skip


def test_placeholders_become_parts(tmp_path: Path) -> None:
    row = {"text": "a <image>b<image>", "images": ["x.png", "y.png"]}
    data = load(jsonl(tmp_path, [row]), multimodal_keys={"image": "images"})
    assert data[0].prompt == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a "},
                {"type": "image", "image": "x.png"},
                {"type": "text", "text": "b"},
                {"type": "image", "image": "y.png"},
            ],
        }
    ]


def test_more_placeholders_than_media_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:1: more <image> placeholders in the prompt than .* 'images'"):
        load(jsonl(tmp_path, [{"text": "<image><image>", "images": ["x"]}]), multimodal_keys={"image": "images"})


def test_unused_media_and_list_contents_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "no", "images": ["x"]}, {"text": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}]
    data = load(jsonl(tmp_path, rows), multimodal_keys={"image": "images"})
    assert data[1].prompt == rows[1]["text"]
    assert "1 rows have more media than placeholders" in caplog.text
    assert "1 rows have contents that are lists" in caplog.text


def test_unknown_media_types_are_refused() -> None:
    with pytest.raises(FlagError, match=r"--multimodal-keys: expected one of image, video, audio, got 'smell'"):
        MediaKeys({"smell": "smells"})


def test_a_processor_needs_message_lists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs message lists"):
        Dataset(jsonl(tmp_path, ROWS), TOKENIZER, object(), None)


# ---- length ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_messages", [False, True])
def test_long_prompts_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, as_messages: bool
) -> None:
    texts = ["1", "12", "123", "1234"]
    rows = [{"text": [{"role": "user", "content": t}] if as_messages else t} for t in texts]
    with caplog.at_level(logging.WARNING):
        data = load(jsonl(tmp_path, rows), max_length=2)
    assert [s.prompt for s in data.samples] == [row["text"] for row in rows[:2]]
    assert (
        "dropped 2 of 4 prompts: longer than 2 tokens (--rollout-max-prompt-len); lengths go from 1 to 4" in caplog.text
    )


def test_when_every_prompt_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 5 prompts are longer than 3 tokens; the shortest has 5"):
        load(jsonl(tmp_path, ROWS), max_length=3)


def test_filter_without_a_limit_keeps_everything() -> None:
    samples = [Sample(prompt="1" * 200)]
    assert filter_long_prompt(samples, TOKENIZER, None, None) is samples
    assert prompt_lengths(samples, TOKENIZER, None) == [200]


# ---- order -------------------------------------------------------------------------------------------------------


def test_shuffle_is_the_published_permutation(tmp_path: Path) -> None:
    data = load(jsonl(tmp_path, ROWS), seed=42)
    assert (data.epoch_id, len(data)) == (-1, 5)
    data.shuffle(0)
    assert [s.prompt for s in data.samples] == [ROWS[i]["text"] for i in (3, 1, 2, 4, 0)]


def test_every_epoch_permutes_the_original_order(tmp_path: Path) -> None:
    import random

    data = load(jsonl(tmp_path, ROWS), seed=7)
    state = random.getstate()
    data.shuffle(3)
    data.shuffle(1)
    assert random.getstate() == state, "the global generator is not touched"
    again = load(jsonl(tmp_path, ROWS), seed=7)
    again.shuffle(1)
    assert [s.prompt for s in data.samples] == [s.prompt for s in again.samples]
    order = data.samples
    data.shuffle(1)
    assert data.samples is order
