"""A rollout function that never returns: keeps the engines up for use by hand (`--rollout-function-path`)."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

NAP_S = 3600.0


def sleep(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> NoReturn:
    """Block until the process is stopped."""
    address = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
    logger.info("rollout %d sleeps; the engines answer at %s until the run is stopped (Ctrl-C)", rollout_id, address)
    while True:
        time.sleep(NAP_S)
