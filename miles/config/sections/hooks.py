"""The plug points of a run: one path flag per entry of `miles.hooks.CATALOG`, which declares them."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import TYPE_CHECKING

from miles.config.flags import Section, flag
from miles.hooks.catalog import CATALOG

# Its default depends on an environment variable, which is read when a command line is parsed.
ROLLOUT_FUNCTION = CATALOG["rollout_function"]

COMMON = (
    "custom_rm",
    "custom_generate_function",
    "dynamic_sampling_filter",
    "rollout_function",
    "custom_loss_function",
)


class HooksConfig(Section):
    """Dotted paths of the run's plug-ins, by attribute name of `args`; None where none is named.

    Example: `config.hooks.custom_rm_path == "my.rewards.grade"`
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> str | list[str] | None: ...


DeclaredHooks = make_dataclass(
    "DeclaredHooks",
    [
        (
            point.dest,
            "list[str] | None" if point.nargs else "str | None",
            flag(
                None if point is ROLLOUT_FUNCTION else point.default,
                point.help,
                option=point.flag,
                common=point.name in COMMON,
            ),
        )
        for point in CATALOG.values()
    ],
    bases=(HooksConfig,),
    namespace={"__module__": __name__},  # where pickle finds it
    frozen=True,
    kw_only=True,
)
