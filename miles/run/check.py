"""`miles check <flags of a run>`: everything that can be found wrong without starting anything."""

from __future__ import annotations

from collections.abc import Sequence

from miles.config import parse
from miles.hooks.check import check_main


def main(argv: Sequence[str]) -> int:
    config, args = parse(list(argv))
    return check_main(config, args)
