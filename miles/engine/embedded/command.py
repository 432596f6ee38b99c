"""`miles serve`: an embedded engine as a server of its own, started by a person or as a child of a run.

A run gives it the weights by an inherited file descriptor (`--weights-fd`), and it ends with the run (`--parent-pid`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.engine.guard import Guard, is_loopback, token_of_process
from miles.engine.listen import bind_port, url_of
from miles.engine.parent import die_with
from miles.errors import FlagError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from miles.engine.embedded.engine import EmbeddedEngine

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="miles serve", description="Serve a Hugging Face folder with the embedded engine, over SGLang's HTTP API."
    )
    out.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face folder (Llama, Qwen2, Qwen3, Qwen3-MoE)"
    )
    out.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    out.add_argument("--port", type=int, default=30000, help="port to listen on; 0 takes a free one")
    out.add_argument("--max-running-requests", type=int, default=256, metavar="N", help="requests in one batch")
    out.add_argument("--max-total-tokens", type=int, metavar="N", help="tokens in the cache (default: by memory)")
    out.add_argument("--context-length", type=int, metavar="N", help="tokens of prompt and answer (default: config)")
    out.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored in the folder")
    out.add_argument("--device", default="cpu", help="torch device, for instance cuda:0")
    out.add_argument("--threads", type=int, metavar="N", help="processor threads (default: OMP_NUM_THREADS)")
    out.add_argument("--seed", type=int, default=0, help="seed of requests that bring none")
    out.add_argument("--exact", action="store_true", help="log-probs bit for bit as with --true-on-policy-mode")
    out.add_argument("--tool-call-parser", metavar="NAME", help="of chat completions (default: by the chat template)")
    out.add_argument(
        "--max-queued-requests", type=int, default=8192, metavar="N", help="requests inside; more are answered 503"
    )
    out.add_argument(
        "--max-body-bytes", type=int, default=64 << 20, metavar="N", help="of a request (not of weights); more is 413"
    )
    out.add_argument(
        "--weights-timeout", type=float, default=300.0, metavar="S", help="seconds a weight update waits for its sender"
    )
    out.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="of the web server")
    out.add_argument("--weight-version", default="default", metavar="V", help="of the weights at the start")
    out.add_argument("--weights-fd", type=int, metavar="FD", help="inherited descriptor of memory with the weights")
    out.add_argument("--weights-layout", metavar="FILE", help="JSON: where in that memory each tensor lies")
    out.add_argument("--parent-pid", type=int, metavar="PID", help="end with this process, which started the server")
    return out


def main(argv: Sequence[str]) -> int:
    """Load, print the address, serve until SIGINT or SIGTERM. Returns the exit status."""
    options = parser().parse_args(argv)
    try:
        _check(options)
        if options.parent_pid is not None:
            die_with(options.parent_pid)
        with bind_port(options.host, options.port, flag="--port") as listener:
            _serve(options, listener)
    except UsageError as error:
        print(f"miles serve: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _check(options: argparse.Namespace) -> None:
    """FlagError for what cannot be served."""
    least = {
        "max_running_requests": 1,
        "max_total_tokens": 2,
        "context_length": 2,
        "threads": 1,
        "max_queued_requests": 1,
        "max_body_bytes": 1,
        "weights_timeout": 0.001,
    }
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and not value >= number:
            raise FlagError(f"--{name.replace('_', '-')}", given=value, expected=f"a number >= {number}")
    if (options.weights_fd is None) != (options.weights_layout is None):
        raise FlagError(
            "--weights-fd",
            given=options.weights_fd,
            expected=f"a file descriptor together with --weights-layout (got {options.weights_layout!r})",
            remedy="Give both or none.",
        )
    if options.exact and options.dtype not in (None, "float32"):
        raise FlagError("--exact", given=options.dtype, expected="--dtype float32", remedy="Leave --dtype out.")


def shared_weights(fd: int, layout_file: str, device: str) -> Callable[[], Mapping[str, Tensor]]:
    """Reads the tensors in an inherited memory, in place on the CPU. FlagError for what is none."""
    from miles.weights.shared_memory import layout_from_json, views

    try:
        layout, size = layout_from_json(json.loads(Path(layout_file).read_text()))
    except (OSError, ValueError) as error:
        raise FlagError("--weights-layout", given=layout_file, expected=f"a layout in JSON ({error})") from error
    try:
        held = os.fstat(fd).st_size
        if held < size:
            raise FlagError("--weights-fd", given=fd, expected=f"memory of {size} bytes, and not of {held}")
        tensors = views(fd, layout, size)
    except (OSError, ValueError) as error:
        raise FlagError("--weights-fd", given=fd, expected=f"an inherited file descriptor ({error})") from error
    if device == "cpu":
        return lambda: tensors
    return lambda: {name: tensor.to(device) for name, tensor in tensors.items()}


def _load(options: argparse.Namespace) -> tuple[EmbeddedEngine, Callable[[], Mapping[str, Tensor]] | None]:
    """The engine, and what reads the memory that it shares."""
    import torch

    from miles.engine.embedded.engine import EmbeddedEngine, in_passing_thread

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings: dict[str, Any] = {
        "dtype": getattr(torch, options.dtype) if options.dtype else None,
        "max_running_requests": options.max_running_requests,
        "max_total_tokens": options.max_total_tokens,
        "context_length": options.context_length,
        "seed": options.seed,
        "exact": options.exact,
        "weight_version": options.weight_version,
    }
    if options.weights_fd is None:
        return in_passing_thread(
            lambda: EmbeddedEngine.from_folder(options.model, device=options.device, **settings)
        ), None
    read = shared_weights(options.weights_fd, options.weights_layout, options.device)
    return in_passing_thread(lambda: EmbeddedEngine.from_folder(options.model, read=read, **settings)), read


def _serve(options: argparse.Namespace, listener: socket.socket) -> None:
    # Here, so that `--help` and a wrong flag are answered without the framework.
    import uvicorn

    from miles.engine.embedded.http import Limits
    from miles.engine.embedded.server import OPEN_PATHS, create_app

    engine, shared = _load(options)
    limits = Limits(
        body_bytes=options.max_body_bytes,
        queued_requests=options.max_queued_requests,
        weights_timeout_s=options.weights_timeout,
    )
    app: Any = create_app(engine, limits=limits, shared=shared, tool_call_parser=options.tool_call_parser)
    if not is_loopback(options.host):
        app = Guard(app, token=token_of_process(), open_paths=OPEN_PATHS)
    print(f"Serving {options.model} at {url_of(listener)} (stop with Ctrl-C)", flush=True)
    config = uvicorn.Config(
        app, log_level=options.log_level, access_log=options.log_level in ("info", "debug"), timeout_graceful_shutdown=2
    )
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        engine.close()
