"""The plug points of a run: one path flag per entry of `miles.hooks.CATALOG`, which declares them."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import TYPE_CHECKING

from miles.config.flags import Section, Status, flag, not_built
from miles.hooks.catalog import CATALOG
from miles.hooks.point import PlugPoint

# Its default depends on an environment variable, which is read when a command line is parsed.
ROLLOUT_FUNCTION = CATALOG["rollout_function"]

COMMON = (
    "custom_rm",
    "custom_generate_function",
    "dynamic_sampling_filter",
    "rollout_function",
    "custom_loss_function",
)
NOT_CALLED: dict[str, str] = {}
"""Plug points without a call site yet -> what is missing."""


class HooksConfig(Section):
    """Dotted paths of the run's plug-ins, by attribute name of `args`; None where none is named.

    Example: `config.hooks.custom_rm_path == "my.rewards.grade"`
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> str | list[str] | None: ...


def _status(point: PlugPoint) -> Status:
    return not_built(NOT_CALLED[point.name]) if point.name in NOT_CALLED else Status()


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
                status=_status(point),
            ),
        )
        for point in CATALOG.values()
    ],
    bases=(HooksConfig,),
    namespace={"__module__": __name__},  # where pickle finds it
    frozen=True,
    kw_only=True,
)
