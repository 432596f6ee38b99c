"""Log lines of a process, in a process of its own: logging belongs to the process."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import io, logging, sys
from miles.utils.logging_utils import configure_logger
logging.basicConfig(level=logging.ERROR)    # somebody was here before
configure_logger("rank 0")
configure_logger("second call")
logging.getLogger("miles.x").info("hello")
logging.getLogger("miles.x").debug("too fine")
for name in ("httpx", "transformers.modeling_utils", "uvicorn.access", "urllib3.connectionpool"):
    logging.getLogger(name).info("chatter")
    logging.getLogger(name).warning("heard " + name)
real, sys.stderr = sys.stderr, io.StringIO()
logging.getLogger("miles.x").info("while a display is shown")
seen, sys.stderr = sys.stderr.getvalue(), real
print(seen)
"""


def test_log_lines() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert lines[0].endswith("INFO: hello") and "rank 0 " in lines[0]
    assert [line.rsplit("WARNING: ")[1] for line in lines[1:]] == [
        "heard httpx",
        "heard transformers.modeling_utils",
        "heard uvicorn.access",
        "heard urllib3.connectionpool",
    ]
    assert "while a display is shown" in done.stdout and "second call" not in done.stdout + done.stderr


def test_importing_observe_loads_nothing_heavy() -> None:
    modules = "display files jsonable lock logging metrics plots record rollout_file summary timers tracking versions"
    imports = "; ".join(f"import miles.observe.{name}" for name in modules.split())
    code = (
        f"import sys; {imports}; heavy = 'torch numpy pyarrow rich matplotlib plotext transformers wandb yaml psutil';"
        "print([name for name in heavy.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
