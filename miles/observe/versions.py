"""What produced a run: versions of Python and the libraries, the commit of the code, hashes of the plug-ins' sources.

Nothing is imported to learn its version. Leaves the file to `miles.observe.record`.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Libraries whose version can change the result of a run.
LIBRARIES = ("miles", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "ray", "sglang")


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def git_commit(directory: Path) -> str | None:
    """The commit that `directory` has checked out; None outside a git checkout or without git."""
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def collect_versions(plugins: Mapping[str, Any]) -> dict[str, Any]:
    """The content of versions.json. A library that is not installed has the version null.

    Example::

        {"python": "3.11.9", "platform": "Linux-...", "libraries": {"miles": "0.1.0", "torch": "2.13.0", ...},
         "git_commit": "28e1804...", "plugins": {"--custom-rm-path": {"file": "/w/rewards.py", "sha256": "ab01..."}}}
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {library: _version(library) for library in LIBRARIES},
        "git_commit": git_commit(Path(__file__).parent),
        "plugins": dict(plugins),
    }


def source_hashes(functions: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, str | None]]:
    """Per flag the file that defines the plug-in and the SHA-256 of its content; null where there is no source.

    Example: `{"--custom-rm-path": {"file": "/w/rewards.py", "sha256": "ab01..."}}`
    """
    hashes: dict[str, dict[str, str | None]] = {}
    for flag, function in functions.items():
        try:
            file = inspect.getsourcefile(inspect.unwrap(function))
        except TypeError:
            file = None
        if file is None or not Path(file).is_file():
            hashes[flag] = {"file": file, "sha256": None}
        else:
            hashes[flag] = {"file": file, "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    return hashes
