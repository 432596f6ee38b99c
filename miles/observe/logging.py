"""Log lines of a process: one format, to whatever stderr is at that moment, without the chatter of libraries.

The handler looks up `sys.stderr` for each line, so that lines appear above a live display, which replaces it while it
is shown. Leaves levels of single modules to their owners.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

# Loggers that report each request or each file; their warnings still come through.
CHATTY = (
    "absl",
    "asyncio",
    "datasets",
    "filelock",
    "fsspec",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "matplotlib",
    "PIL",
    "transformers",
    "urllib3",
    "uvicorn",
    "uvicorn.access",
    "uvicorn.error",
)

_configured = False


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the present `sys.stderr`."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure_logger(prefix: str = "", *, level: int = logging.INFO) -> None:
    """Set up logging, once per process (later calls change nothing). `prefix` says which process speaks.

    Libraries listed in CHATTY are heard from WARNING on; transformers and the Hub draw no progress bars, unless the
    environment asks for them.
    """
    global _configured
    if _configured:
        return
    _configured = True
    label = f"{prefix} " if prefix else ""
    logging.basicConfig(
        level=level,
        format=f"[%(asctime)s] {label}%(filename)s:%(lineno)d %(levelname)s: %(message)s",
        handlers=[_StderrHandler()],
        force=True,
    )
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
