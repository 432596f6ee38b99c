"""The settings of a run while they are being worked out: values, and where each of them came from.

A `Draft` is all there is between the command line and the frozen sections. `miles.config.parse` gives it what the user
wrote, `miles.config.resolve` works out the rest, and then it is thrown away.
"""

from __future__ import annotations

from typing import Any, Literal

from miles.config.environ import default_rollout_function_path
from miles.config.sections import FLAGS

Origin = Literal["default", "file", "command line", "custom config", "substituted", "derived"]

GIVEN: tuple[Origin, ...] = ("file", "command line", "custom config")


class Draft:
    """Values by name. `draft["lr"]` reads; `give`, `substitute`, `derive` and `rewrite` say why they write."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {name: flag.fresh_default() for name, flag in FLAGS.items()}
        self.values["rollout_function_path"] = default_rollout_function_path()
        self.origins: dict[str, Origin] = dict.fromkeys(FLAGS, "default")
        self.extras: dict[str, Any] = {}
        # Extras of `--sglang-<flag>` and `--router-<flag>` that nobody declares.
        self.passed: list[str] = []
        self.eval_datasets: list[Any] = []
        self.notices: list[str] = []
        # Plug points that a plug-in of the run declares itself: it calls them, whatever the core does.
        self.claimed: set[str] = set()
        self.substitutions: dict[str, str] = {}
        # GPUs that this process may use.
        self.gpus = 0

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def option(self, name: str) -> str:
        return FLAGS[name].option

    def shown(self, name: str) -> str:
        """The flag as it would be written to get its value. Example: `--lr 0.1`, `--no-bf16`, `--swiglu`."""
        flag, value = FLAGS[name], self.values[name]
        if flag.kind == "either" and value is False:
            return "--no-" + flag.option.removeprefix("--")
        return flag.option if flag.is_switch else f"{flag.option} {value}"

    def given(self, name: str) -> bool:
        """Whether the user wrote this flag anywhere."""
        return self.origins[name] in GIVEN

    def give(self, name: str, value: Any, origin: Origin) -> None:
        """What the user wrote; a name that is no flag is an extra attribute of `args`."""
        target = self.values if name in FLAGS else self.extras
        target[name] = value
        self.origins[name] = origin

    def substitute(self, name: str, value: Any, why: str) -> None:
        """Replace a published default that cannot be honoured here. What the user wrote stays."""
        if self.given(name) or self.values[name] == value:
            return
        before = self.values[name]
        self.substitutions[name] = f"{self.option(name)}: {value!r} in place of the default {before!r}: {why}"
        self.notices.append(self.substitutions[name])
        self.values[name] = value
        self.origins[name] = "substituted"

    def derive(self, name: str, value: Any) -> None:
        """A value that follows from others, whatever stood there before."""
        if self.values[name] != value:
            self.values[name] = value
            self.origins[name] = "derived"

    def fill(self, name: str, value: Any) -> None:
        """`derive`, where nothing stands yet."""
        if self.values[name] is None:
            self.derive(name, value)

    def rewrite(self, name: str, value: Any) -> None:
        """The same setting in its canonical form."""
        self.values[name] = value
