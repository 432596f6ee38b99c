"""The page docs/customization.md, written from the catalogue: `miles hooks --markdown > docs/customization.md`.

What every plug point says about itself comes from its declaration, what it is for from `guide`, its example from the
file examples/plug_ins/<name>.py of the source tree. The text above all of them is `HEAD`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from miles.hooks.catalog import CATALOG
from miles.hooks.guide import ARGUMENTS, CHAPTERS, ENTRIES, Chapter
from miles.hooks.point import Form, PlugPoint, allowed_policies

EXAMPLES = Path(__file__).parents[2] / "examples" / "plug_ins"
WIDTH = 120

HEAD = """\
# Customization

A plug-in is a function or a class of yours that a flag names; a run calls it in place of its own code, or beside it.
There are {count} plug points. This page is `miles hooks --markdown`; `miles hooks custom-rm` shows one of them in the
terminal, and `miles new custom-rm grade.py` writes a plug-in that works, with a passing test. The examples below are
the files of [examples/plug_ins](../examples/plug_ins/README.md), and each of them can be run as it is shown.

## What holds for all of them

**Paths.** `package.module.function`, `package.module:function` and `path/to/file.py:function` all load; files and
packages are looked for in the working directory first.

```bash
miles check --config examples/quickstart/carry.yaml --custom-rm-path examples/own_reward/reward.py:reward
```

`miles check` takes the flags of a run, loads every plug-in, prints which form it was recognised as, calls the ones that
have no effect but their value on made-up samples ([check and replay](check-and-replay.md)), and starts nothing.
`miles train` loads and recognises them before anything else. All problems come in one report, with exit status 2: the
flag, what was found, what is expected, what to do.

**Forms.** Many plug points accept more than one signature. The form is found by binding the arguments; where several
bind, parameter names and annotations decide; what is still ambiguous is an error that names `--hook-form`.

**Synchronous and asynchronous.** The core awaits the plug points whose signature says `async def`. A plain function
there runs in a thread. Rollout and evaluation functions may be either. All other plug points are called inline, one
call at a time, and must be plain functions.

**Classes.** Where a class is accepted in place of a function, it is instantiated once. An object with `state_dict()`
and `load_state_dict(state)` is saved with every checkpoint and restored on resume.

**`args`.** Every plug-in that takes `args` gets the same `argparse.Namespace`: every flag under its name with
underscores. It belongs to the plug-ins, which may write on it; the core never reads it back.

**Flags of its own.** A plug-in with a callable `add_arguments` adds options to the command line and to `--config`:

```python
def reward(args, sample):
    return args.point_per_letter * len(sample.response)


def add_arguments(parser):
    parser.add_argument("--point-per-letter", type=float, default=0.1)


reward.add_arguments = add_arguments
```

**Failures.** A call that raises, or returns what cannot be used, ends the run with an error card: the line of the
plug-in, the sample, how to replay the call. `--hook-policy` may say otherwise, see
[rewards and failures](rewards-and-failures.md). Calls, failures and seconds of every plug-in are in the metrics as
`hooks/<name>/...`.

**Plug-ins that exist already.** They load as they are: reward functions of TRL and verl are recognised by the names of
their parameters ([rewards and failures](rewards-and-failures.md#functions-written-for-trl-and-verl)), and where slime
is not installed, imports of `slime.utils.types` and the like are answered by the module of miles at the same place.
`miles check` and `miles hooks` say so behind the form:

```python
from pathlib import Path

Path("moved.py").write_text('''
from slime.utils.types import Sample


async def reward(args, sample: Sample):
    return float(sample.response.endswith(f"{sample.label}<eos>"))
''')
```

```console
$ miles hooks --custom-rm-path moved.py:reward
flag              path             form                                       defined at  policy
--custom-rm-path  moved.py:reward  sample (imports of slime answered by miles)  moved.py:5  raise
1 plug-in bound, no problems.
```

What such files import is kept at its published path, such as `miles.rollout.sglang_rollout`, `miles.rollout.rm_hub`,
`miles.utils.types` and `miles.utils.http_utils`. What plug-ins import of `megatron.training` is answered as well, where
only megatron-core is installed ([a model of one's own](megatron.md#a-model-of-ones-own)).

**Types.** `Sample`, `RolloutFnTrainInput` and the other carriers are in [miles/types.py](../miles/types.py), each with
an example. `Group` is `list[Sample]`: the answers to one prompt.

The flag of a plug point whose caller is not built yet is refused; `miles train --help-all` marks it.
"""


def customization_page(points: Iterable[PlugPoint] = ()) -> str:
    """The whole page as Markdown, or the sections of the plug points that are given."""
    given = list(points)
    if given:
        return "\n".join(_section(point) for point in given)
    table = ["| Plug point | Process | Called |", "|---|---|---|"]
    ordered = [CATALOG[name] for chapter in CHAPTERS for name in chapter.points]
    table += [f"| [`{p.flag}`](#{p.flag}) | {p.process} | {p.when} |" for p in ordered]
    head = HEAD.replace("{count}", str(len(ordered)))
    chapters = [_chapter(number, chapter) for number, chapter in enumerate(CHAPTERS, start=1)]
    return "\n".join([head, "## Overview\n", *table, "", *chapters])


def _chapter(number: int, chapter: Chapter) -> str:
    text = _paragraph(chapter.text) if chapter.text else []
    return "\n".join([f"## {number}. {chapter.title}\n", *text, *(_section(CATALOG[name]) for name in chapter.points)])


def _section(point: PlugPoint) -> str:
    """One plug point.

    Example (its beginning)::

        ### `--custom-rm-path`

        What is learned. A number per response, or several in a dict of which `--reward-key` names the one to train.

        - Called: Once per generated sample, or once per group with --group-rm.
    """
    entry = ENTRIES[point.name]
    lines = [
        f"### `{point.flag}`\n",
        *_paragraph(entry.purpose),
        *_paragraph(f"People use it for: {'; '.join(entry.uses)}."),
        f"- Called: {point.when}",
        f"- Process: {point.process}, {_backends(point)}",
        f"- Default: {f'`{point.default}`' if point.default else 'none'}",
        f"- On failure (`--hook-policy {point.key}=...`): {allowed_policies(point)}",
        *(f"    - `{action}`: {what}" for action, what in point.tolerates),
        f"- Before a run: `miles check` {'calls it' if point.pure else 'binds it, and does not call it'}",
        f"- After a run: {_replay(point)}",
    ]
    if point.plural:
        lines.append("- Several paths may be given.")
    if point.instantiates:
        lines.append("- A class is instantiated without arguments; its objects are called like the functions.")
    if point.methods:
        lines.append(f"- Methods of the object: {', '.join(f'`{name}`' for name in point.methods)}")
    call = f"{_word(point)} {point.name}{point.canonical}: ..."
    lines += ["", *_code(call), f"{point.contract}\n", *_arguments(point), *_forms(point), *_example(point)]
    return "\n".join(lines)


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False), ""]


def _backends(point: PlugPoint) -> str:
    return "every backend" if len(point.backends) > 1 else f"the {point.backends[0]} backend only"


def _replay(point: PlugPoint) -> str:
    if point.replay:
        return f"not replayed. {point.replay}"
    if not ENTRIES[point.name].on_record:
        return "`miles replay` makes a failed call again, from its bundle"
    return f"`miles replay {point.key}` calls it on recorded samples, or makes a failed call again from its bundle"


def argument_names(point: PlugPoint) -> list[str]:
    """Of the canonical call, then those that only other forms have."""
    canonical = list(inspect.signature(point.protocol.__call__).parameters)[1:]
    others = [name for form in point.forms for name in (*form.positional, *form.keywords, *form.also)]
    return list(dict.fromkeys([*canonical, *others]))


def _arguments(point: PlugPoint) -> list[str]:
    """A table with a line per argument. KeyError for one that `guide` does not know."""
    own = ENTRIES[point.name].arguments
    rows = [f"| `{name}` | {own[name] if name in own else ARGUMENTS[name]} |" for name in argument_names(point)]
    return ["| Argument | What it is |", "|---|---|", *rows, ""] if rows else []


def _forms(point: PlugPoint) -> list[str]:
    if len(point.forms) == 1 and point.forms[0].target == "function":
        return []
    accepted = [line for form in point.forms for line in _form(point, form)]
    return [f"Accepted forms (`--hook-form {point.key}=...`):\n", *_code(*accepted)]


def _code(*lines: str, language: str = "python") -> list[str]:
    return [f"```{language}", *lines, "```\n"]


def _form(point: PlugPoint, form: Form) -> list[str]:
    """A form as it is written in source, under its name and how it is recognised."""
    head = f"# {form.name}: {form.recognised_by}"
    if form.target == "value":
        return [head, f"{point.name}: {form.signature.removeprefix('() -> ')}"]
    if form.target == "class":
        return [head, f"class {point.name}:", f"    def __init__(self, {form.signature.removeprefix('(')}: ..."]
    return [head, f"{_word(point)} {point.name}{form.signature}: ..."]


def _word(point: PlugPoint) -> str:
    return "async def" if point.awaited else "def"


# ---- examples ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A file of examples/plug_ins, taken apart.

    `title` is the first paragraph of its docstring, `command` the indented one in one line, `text` the paragraphs after
    it, `code` the file without the docstring.
    """

    title: str
    command: str
    text: tuple[str, ...]
    code: str


def example_of(point: PlugPoint) -> Example:
    """Raises OSError where the source tree is not there, ValueError for a docstring of another shape."""
    source = (EXAMPLES / f"{point.name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    title, command, *text = (ast.get_docstring(tree) or "").split("\n\n")
    if not command.startswith("    miles "):
        raise ValueError(f"{point.name}.py: the second paragraph of the docstring is not an indented miles command")
    end = tree.body[0].end_lineno or 0
    return Example(title, " ".join(command.split()), tuple(text), "\n".join(source.splitlines()[end:]).strip())


def _example(point: PlugPoint) -> Sequence[str]:
    """The example with its command; nothing where miles is installed without its source tree."""
    if not EXAMPLES.is_dir():
        return []
    example = example_of(point)
    link = f"[{point.name}.py](../examples/plug_ins/{point.name}.py)"
    title = " ".join(example.title.split())
    return [
        *_paragraph(f"Example, {link}. {title}"),
        *_code(example.command, language="bash"),
        *(f"{paragraph}\n" for paragraph in example.text),
        *_code(example.code),
    ]
