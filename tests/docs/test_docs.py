"""The documentation is true: its code runs, its commands parse, its output is printed, its links lead somewhere.

    ```python     run, each block alone, in a folder with `examples/` and the record of a short quickstart
    ```bash       `miles` commands are parsed (`miles check`, `miles hooks` run), `make` targets exist, bodies of `curl`
                  are read, what `pip` installs is what the project is tested with
    ```console    run, and the output compared; a line `...` stands for any lines
    ```yaml       read as flags; `yaml eval-config` and `yaml custom-config` as those files
    ```json       parsed
    ```text       shown output and pictures of it; the ones that can be made cheaply are compared below
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from docs_pages import (
    PAGES,
    ROOT,
    Block,
    Command,
    anchors,
    bash_commands,
    blocks,
    console_commands,
    flags_named,
    inline_commands,
    links,
    prose,
)

from miles.__main__ import COMMANDS, main
from miles.config import parse
from miles.config.parse import build_parser
from miles.config.sections import FLAGS
from miles.config.yaml_file import read_entries
from miles.engine.embedded import command
from miles.engine.protocol import GenerateRequest
from miles.errors import DataError, HookError, MilesError
from miles.hooks import CATALOG, bind, plug_point_named
from miles.hooks.check import list_main
from miles.hooks.guide import ARGUMENTS, CHAPTERS, ENTRIES
from miles.hooks.point import PlugPoint, allowed_policies
from miles.observe.record import read_rollouts
from miles.rollout.dataset import read_rows
from miles.rollout.generate_hub import multi_turn
from miles.router import serve as route
from miles.trial.table import why_not_replayed
from miles.types import Sample

README = ROOT / "README.md"
CUSTOMIZATION = ROOT / "docs" / "customization.md"

# What a file of flags may leave out, because the page's reader has it elsewhere.
REQUIRED = {
    "hf-checkpoint": "examples/quickstart/base",
    "prompt-data": "examples/quickstart/data/train.jsonl",
    "rollout-batch-size": "16",
    "num-rollout": "1",
    "global-batch-size": "16",
    "rm-type": "math",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder of a reader: `examples/`, a plug-in of another framework, and a quickstart of two rollouts."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "foreign.py").write_text(next(b.text for b in blocks("python") if "compute_score" in b.text))
    datasets = yaml.safe_load((ROOT / "examples/quickstart/eval.yaml").read_text())["datasets"]
    short = [{**dataset, "path": f"{dataset['path']}@[0:8]"} for dataset in datasets]
    (folder / "eval.yaml").write_text(yaml.safe_dump({"datasets": short}))
    before, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        flags = ["--num-rollout", "2", "--eval-config", "eval.yaml", "--quiet"]
        assert main(["train", "--config", "examples/quickstart/carry.yaml", *flags]) == 0
        yield folder
    finally:
        torch.set_num_threads(threads)
        os.chdir(before)


# ---- code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block: Block, workplace: Path) -> None:
    # Signatures are shown with types that the page does not import: like this file, blocks do not evaluate annotations.
    exec(compile(block.text, str(block), "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_read(block: Block, workplace: Path) -> None:
    file = workplace / "block.yaml"
    file.write_text(block.text)
    option = f"--{block.info}" if block.info == "eval-config" else "--custom-config-path" if block.info else "--config"
    entries = read_entries(str(file), option, lambda key: key in FLAGS and FLAGS[key].kind in ("json", "pairs"))
    given = {entry.key.replace("_", "-") for entry in entries} if option == "--config" else set()
    missing = [word for name, value in REQUIRED.items() if name not in given for word in (f"--{name}", value)]
    config, args = parse([option, str(file), *missing])
    content = yaml.safe_load(block.text)
    if block.info == "eval-config":
        assert [dataset.name for dataset in config.eval.eval_datasets] == [d["name"] for d in content["datasets"]]
    elif block.info == "custom-config":
        assert {name: vars(args)[name] for name in content} == content


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    assert json.loads(block.text)


def test_every_block_says_what_it_is() -> None:
    known = {"python", "bash", "console", "yaml", "json", "text"}
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert {fence.split()[0] if fence else "" for fence in fences[::2]} <= known, page
        assert not any(fences[1::2]), page


def test_the_readme_shows_the_example() -> None:
    block = next(b for b in blocks("python") if b.page == README)
    source = (ROOT / "examples/own_reward/reward.py").read_text()
    assert source.endswith(block.text)


def test_the_example_trains(workplace: Path) -> None:
    """The README's command, shortened to one rollout: shares of a point, which the quickstart's reward never gives."""
    flags = ["--custom-rm-path", "examples/own_reward/reward.py:reward", "--run-dir", "runs/own_reward", "--quiet"]
    short = ["--num-rollout", "1", "--rollout-batch-size", "4", "--skip-eval-before-train", "--eval-interval", "9"]
    assert main(["train", "--config", "examples/quickstart/carry.yaml", *flags, *short]) == 0
    rewards = {sample.reward for sample in read_rollouts("runs/own_reward", 0)}
    assert rewards - {0.0, 1.0} and all(0 <= reward <= 1 for reward in rewards)


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", bash_commands(), ids=str)
def test_bash_is_understood(command: Command, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = command.words
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "curl":
        check_curl(words)
    elif program == "pip":
        assert words[0] == "install" and f'"{words[1]}"' in (ROOT / "pyproject.toml").read_text()
    else:
        assert program == "miles", f"a command that no test knows: {command}"
        check_miles(words)


def check_miles(words: list[str]) -> None:
    name, *argv = words
    if name == "train":
        parse(argv)
    elif name == "serve":
        command.parser().parse_args([word for word in argv if word != "&"])
    elif name == "route":
        route.parser().parse_args(argv)
    elif name == "replay":
        assert len(argv) >= 1
    else:
        assert main(words) == 0


def check_curl(words: list[str]) -> None:
    address, data = words[0], words[words.index("-d") + 1]
    assert address.endswith("/generate")
    assert len(GenerateRequest.from_payload(json.loads(data))) == 1


@pytest.mark.parametrize("command", inline_commands(), ids=str)
def test_commands_in_sentences(command: Command, workplace: Path) -> None:
    name, *argv = command.words[1:]
    assert name.startswith("-") or name in COMMANDS
    if name in ("train", "check") and any(word.endswith(".yaml") for word in argv):
        parse(argv)


@pytest.mark.parametrize("command", console_commands(), ids=str)
def test_console_prints_that(command: Command, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, name, *argv = command.words
    assert program == "miles"
    for block in blocks("python"):  # files that the page has its reader write before
        if str(block).partition(":")[0] == command.where.partition(":")[0] and "write_text" in block.text:
            exec(compile(block.text, str(block), "exec"), {"__name__": "documentation"})
    if name == "train":  # shown for its refusal; the run itself would take long
        with pytest.raises(MilesError) as refused:
            parse(argv)
        printed = f"miles: {refused.value}"
    else:
        status = main([name, *argv])
        captured = capsys.readouterr()
        printed = captured.out + captured.err
        assert status == (2 if "miles: " in printed else 0)
    assert_shown(command.output, printed.splitlines())


_MEASURED = re.compile(r"\b\d+(\.\d+)? (ms|s)\b")


def assert_shown(shown: list[str], printed: list[str]) -> None:
    """`shown` is `printed` but for lines where it says `...`; widths of columns and measured times do not matter."""
    expected, lines = ([" ".join(_MEASURED.sub("TIME", line).split()) for line in text] for text in (shown, printed))
    place, free = 0, False
    for line in expected:
        if line == "...":
            free = True
            continue
        if free:
            assert line in lines[place:], f"{line!r} is not printed in:\n" + "\n".join(lines)
            place = lines.index(line, place)
        assert place < len(lines) and lines[place] == line, f"expected {line!r}, printed:\n" + "\n".join(lines[place:])
        place, free = place + 1, False
    assert free or place == len(lines), "not shown:\n" + "\n".join(lines[place:])


# ---- shown output --------------------------------------------------------------------------------------------------

OWN_REWARD = """\
async def reward(args, sample):
    answer = sample.response.split("</think>")[1].removesuffix("<eos>")
    return float(answer == sample.label)
"""


@pytest.mark.parametrize("page", [README, ROOT / "docs/rewards-and-failures.md"], ids=lambda page: page.name)
def test_the_error_card_is_this_one(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my").mkdir()
    Path("my/reward.py").write_text(OWN_REWARD)
    hooks = bind(Namespace(custom_rm_path="my/reward.py:reward"))
    hooks.set_bundle_dir("runs/my/failures")
    response = "<think>6+7=13;9+1+1=11;1+1;6<eos>"
    sample = Sample(group_index=181, index=1449, prompt="196+117=?", label="313", response=response)
    sample.response_length, sample.status = 23, Sample.Status.COMPLETED
    with pytest.raises(HookError) as raised:
        asyncio.run(hooks.custom_rm.call_async(Namespace(reward_key=None), sample))
    cards = [block.text for block in blocks("text") if block.page == page and "failed at" in block.text]
    assert cards == [f"miles: {raised.value}\n"]


def test_the_data_error_is_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"prompt": "1+1=?"}\n' * 16 + "hello\n")
    with pytest.raises(DataError) as raised:
        list(read_rows("train.jsonl"))
    assert f"miles: {raised.value}\n" in [block.text for block in blocks("text")]


# ---- the page of plug points ---------------------------------------------------------------------------------------


def test_customization_is_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", raising=False)
    assert list_main(["--markdown"]) == 0
    written = capsys.readouterr().out
    assert written == CUSTOMIZATION.read_text(), "miles hooks --markdown > docs/customization.md"


def arguments_of(point: PlugPoint) -> list[str]:
    """Of the call that the core makes, then those that only other accepted forms have."""
    names = [name for name in inspect.signature(point.protocol.__call__).parameters if name != "self"]
    for form in point.forms:
        parameters = ast.parse(f"def f{form.signature}: ...").body[0].args  # type: ignore[attr-defined]
        names += [argument.arg for argument in (*parameters.args, *parameters.kwonlyargs)]
        names += form.also
    return list(dict.fromkeys(names))


def test_nothing_else_is_documented() -> None:
    assert [name for chapter in CHAPTERS for name in chapter.points] == list(
        dict.fromkeys(name for chapter in CHAPTERS for name in chapter.points)
    )
    assert {name for chapter in CHAPTERS for name in chapter.points} == set(ENTRIES) == set(CATALOG)
    for name, entry in ENTRIES.items():
        assert set(entry.arguments) <= set(arguments_of(CATALOG[name])), name
    shared = {a for point in CATALOG.values() for a in arguments_of(point) if a not in ENTRIES[point.name].arguments}
    assert shared == set(ARGUMENTS)


def test_the_chapters_are_numbered_as_published() -> None:
    """Readers of the published guide find each plug point under the number that it has there."""
    flags = {"custom-rm": 3, "custom-pg-loss-reducer-function": 11, "data-source": 15, "custom-model-provider": 20}
    text = CUSTOMIZATION.read_text()
    for key, number in flags.items():
        before = text.partition(f"\n### `{plug_point_named(key).flag}`")[0]  # type: ignore[union-attr]
        assert re.findall(r"^## (\d+)\. ", before, re.MULTILINE)[-1] == str(number)


@pytest.mark.parametrize("point", CATALOG.values(), ids=lambda point: point.name)
def test_every_plug_point_is_documented(point: PlugPoint, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, section = CUSTOMIZATION.read_text().partition(f"\n### `{point.flag}`\n")
    section = re.split(r"\n#{2,3} ", section)[0]
    call = f"{'async def' if point.awaited else 'def'} {point.name}{point.canonical}: ..."
    for text in (call, point.when, point.process, point.contract, allowed_policies(point), *ENTRIES[point.name].uses):
        assert " ".join(text.split()) in " ".join(section.split())
    documented = re.findall(r"^\| `(\w+)` \| .+ \|$", section, re.MULTILINE)
    assert documented == arguments_of(point)
    assert ("`miles check` calls it" in section) == point.pure
    assert (f"`miles replay {point.key}`" in section) == (why_not_replayed(point) is None)
    if len(point.forms) > 1:
        assert all(f"# {form.name}: {form.recognised_by}" in section for form in point.forms)
    list_main([point.key, "--markdown"])
    assert section.strip() in capsys.readouterr().out


# ---- flags, links --------------------------------------------------------------------------------------------------


def known_flags() -> set[str]:
    """Of `miles train`, of the plug-ins here and in examples/, of the other commands, and of the benchmarks."""
    parser = build_parser()
    multi_turn.generate.add_arguments(parser)  # type: ignore[attr-defined]
    found = {*parser.options, "--help", "--help-all", "--version"}
    folders = ("miles/hooks", "miles/trial", "miles/run", "benchmarks")
    sources = [file for folder in folders for file in (ROOT / folder).glob("*.py")]
    for file in [*sources, *(ROOT / "examples").glob("*/*.py"), Path(command.__file__), Path(route.__file__)]:
        found |= set(re.findall(r"\badd(?:_argument)?\(\s*\"(--[\w-]+)\"", file.read_text()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_exists(page: Path) -> None:
    assert flags_named(page) <= known_flags()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for file, anchor in links(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file}#{anchor}"


def test_every_page_is_linked() -> None:
    """From the README; those of the examples as folders, from the page of the examples."""
    examples = ROOT / "examples" / "README.md"
    of_examples = {page for page in PAGES if page.parent.parent == ROOT / "examples"}
    assert {file for file, _ in links(README)} >= set(PAGES) - {README} - of_examples
    assert {file for file, _ in links(examples)} >= {page.parent for page in of_examples}


def test_the_readme_says_what_is_not_built() -> None:
    """Each flag of that chapter is refused for some value, and each plug point that is refused stands in it."""
    chapter = prose(README).partition("## What is not built yet")[2].partition("\n## ")[0]
    by_option = {flag.option: flag for flag in FLAGS.values()}
    named = set(re.findall(r"--[a-z][\w-]+", chapter)) - {"--rm-type"}
    assert all(by_option[option].status.kind == "not_built" for option in named)
    refused = {point.flag for point in CATALOG.values() if by_option[point.flag].status.kind == "not_built"}
    assert refused <= named
