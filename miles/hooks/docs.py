"""The page docs/customization.md, written from the catalogue: `miles hooks --markdown > docs/customization.md`.

What every plug point says about itself comes from its declaration. The text around it is `HEAD`.
"""

from __future__ import annotations

from collections.abc import Iterable

from miles.hooks.catalog import CATALOG
from miles.hooks.point import Form, PlugPoint, allowed_policies

HEAD = """\
# Customization

A plug-in is a function or a class of yours that a flag names; a run calls it in place of its own code, or beside it.
There are {count} plug points. This page is `miles hooks --markdown`; `miles hooks custom-rm` shows one of them in the
terminal, and `miles new custom-rm grade.py` writes a plug-in that works, with a passing test.

## What holds for all of them

**Paths.** `package.module.function`, `package.module:function` and `path/to/file.py:function` all load; files and
packages are looked for in the working directory first.

```bash
miles check --config examples/quickstart/carry.yaml --custom-rm-path examples/own_reward/reward.py:reward
```

`miles check` takes the flags of a run, loads every plug-in, prints which form it was recognised as and where it is
defined, and starts nothing. `miles train` does the same before anything else. All problems come in one report, with
exit status 2: the flag, what was found, what is expected, what to do.

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

**Failures.** `--hook-policy` says what happens when a call fails: see [rewards and failures](rewards-and-failures.md).
Calls, failures and seconds of every plug-in are in the metrics as `hooks/<name>/...`.

**Types.** `Sample`, `RolloutFnTrainInput` and the other carriers are in [miles/types.py](../miles/types.py), each with
an example. `Group` is `list[Sample]`: the answers to one prompt.

The flag of a plug point whose caller is not built yet is refused; `miles train --help-all` marks it.
"""


def customization_page(points: Iterable[PlugPoint] = ()) -> str:
    """The whole page as Markdown, of all plug points unless some are given."""
    shown = list(points) or list(CATALOG.values())
    table = ["| Plug point | Process | Called |", "|---|---|---|"]
    table += [f"| [`{p.flag}`](#{p.flag}) | {p.process} | {p.when} |" for p in shown]
    head = HEAD.format(count=len(shown))
    return "\n".join([head, "## Overview\n", *table, "", "## Reference\n", *map(_section, shown)])


def _section(point: PlugPoint) -> str:
    """One plug point.

    Example (its beginning)::

        ### `--custom-rm-path`

        The reward.

        - Called: Once per generated sample, or once per group with --group-rm.
    """
    title = point.help.removeprefix("Plug-in: ")
    lines = [
        f"### `{point.flag}`\n",
        f"{title[0].upper()}{title[1:]}\n",
        f"- Called: {point.when}",
        f"- Process: {point.process}, {_backends(point)}",
        f"- Default: {f'`{point.default}`' if point.default else 'none'}",
        f"- On failure (`--hook-policy {point.key}=...`): {allowed_policies(point)}",
        *(f"    - `{action}`: {what}" for action, what in point.tolerates),
    ]
    if point.plural:
        lines.append("- Several paths may be given.")
    if point.instantiates:
        lines.append("- A class is instantiated without arguments; its objects are called like the functions.")
    if point.methods:
        lines.append(f"- Methods of the object: {', '.join(f'`{name}`' for name in point.methods)}")
    lines += ["", *_code(f"{_word(point)} {point.name}{point.canonical}: ..."), f"{point.contract}\n"]
    if len(point.forms) > 1 or point.forms[0].target != "function":
        accepted = [line for form in point.forms for line in _form(point, form)]
        lines += [f"Accepted forms (`--hook-form {point.key}=...`):\n", *_code(*accepted)]
    return "\n".join(lines)


def _backends(point: PlugPoint) -> str:
    return "every backend" if len(point.backends) > 1 else f"the {point.backends[0]} backend only"


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```\n"]


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
