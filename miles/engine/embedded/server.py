"""SGLang's HTTP API in front of an embedded engine: for plug-ins of a run, for other machines, for `miles serve`.

One engine, one app. Inside a run the app also plays the router's part: `/list_workers` and `/workers` name the server
itself, so that plug-ins which ask the router for its engines find it. Answers are SGLang's; a request that cannot be
served is answered with status 400 and `{"error": {"message": ...}}`, a failed engine with 500.

Later users: release and resume of memory, updates by tensor and process group join here when a transport needs them
(`miles/weights/`); the token that guards control endpoints on a cluster is a middleware of this app.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from miles import __version__
from miles.engine.client import generate_json
from miles.engine.embedded.engine import EmbeddedEngine, in_passing_thread
from miles.engine.listen import bind_port
from miles.engine.protocol import BadRequestError, GenerateRequest, Json, SamplingParams
from miles.errors import EngineError, FlagError, UsageError

DISCONNECT_POLL_S = 0.5
"""How often a waiting answer looks whether its client is still there."""

CLIENT_GONE = 499
"""Status that nobody reads: the client hung up."""


def create_app(engine: EmbeddedEngine, *, own_url: str | None = None) -> FastAPI:
    """The app of one engine. `own_url` is what `/list_workers` answers; None takes the address that was asked."""
    app = FastAPI(title="miles embedded engine", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(BadRequestError, _answer_error)
    app.add_exception_handler(UsageError, _answer_error)
    app.add_exception_handler(EngineError, _answer_error)
    _add_generate(app, engine)
    _add_information(app, engine)
    _add_control(app, engine)
    _add_weights(app, engine)
    _add_router_part(app, own_url)
    return app


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, EngineError):
        status = error.status or 500
    else:
        status = 400
    return JSONResponse({"error": {"message": str(error), "code": status}}, status)


async def _body(request: Request) -> Json:
    """The JSON object of a request; nothing at all counts as `{}`."""
    raw = await request.body()
    if not raw:
        return {}
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(body).__name__}.")
    return body


def _add_generate(app: FastAPI, engine: EmbeddedEngine) -> None:
    @app.api_route("/generate", methods=["POST", "PUT"])
    async def generate(request: Request) -> Response:
        answer = asyncio.ensure_future(generate_json(engine, await _body(request)))
        try:
            while not (await asyncio.wait([answer], timeout=DISCONNECT_POLL_S))[0]:
                if await request.is_disconnected():
                    return Response(status_code=CLIENT_GONE)
        finally:
            answer.cancel()  # a finished answer does not mind; a waiting one aborts its requests
        return JSONResponse(answer.result())

    @app.get("/health_generate")
    async def health_generate() -> Response:
        """Healthy means: one token comes out. A paused engine is healthy."""
        if not engine.paused:
            params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
            await engine.generate(GenerateRequest(input_ids=[0], sampling_params=params))
        return Response()


def _add_information(app: FastAPI, engine: EmbeddedEngine) -> None:
    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/get_model_info")
    @app.get("/model_info")
    async def model_info() -> Json:
        return {
            "model_path": engine.model_path,
            "tokenizer_path": engine.model_path,
            "is_generation": True,
            "weight_version": engine.weight_version,
            "model_type": engine.hf_config.model_type,
            "architectures": engine.hf_config.architectures,
        }

    @app.get("/get_server_info")
    @app.get("/server_info")
    async def server_info() -> Json:
        return {
            "version": __version__,
            "engine": "miles embedded",
            "model_path": engine.model_path,
            "context_length": engine.context_length,
            "max_running_requests": engine.max_running_requests,
            "max_total_num_tokens": engine.max_total_tokens,
            "dtype": str(engine.model.dtype).removeprefix("torch."),
            "device": str(engine.model.device),
            "tp_size": 1,
            "dp_size": 1,
            "weight_version": engine.weight_version,
            "num_unfinished_requests": engine.num_unfinished,
        }

    @app.get("/get_weight_version")
    @app.get("/weight_version")
    async def weight_version() -> Json:
        return {"weight_version": engine.weight_version}


def _add_control(app: FastAPI, engine: EmbeddedEngine) -> None:
    @app.post("/abort_request")
    async def abort_request(request: Request) -> Response:
        body = await _body(request)
        engine.abort(body.get("rid"), abort_all=bool(body.get("abort_all", False)))
        return Response()

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache() -> Response:
        if not await asyncio.to_thread(engine.flush_cache):
            raise BadRequestError("flush_cache: requests are running. Abort them or wait, then flush.")
        return PlainTextResponse("Cache flushed.\n")

    @app.post("/pause_generation")
    async def pause_generation(request: Request) -> Json:
        await asyncio.to_thread(engine.pause, (await _body(request)).get("mode", "abort"))
        return {"status": "ok", "message": "Generation paused."}

    @app.post("/continue_generation")
    async def continue_generation() -> Json:
        await asyncio.to_thread(engine.resume)
        return {"status": "ok", "message": "Generation continued."}


def _add_weights(app: FastAPI, engine: EmbeddedEngine) -> None:
    @app.post("/update_weights_from_disk")
    async def update_weights_from_disk(request: Request) -> Response:
        body = await _body(request)
        path = body.get("model_path")
        if not isinstance(path, str):
            raise BadRequestError(f"model_path: expected the path of a Hugging Face folder, got {path!r}.")
        version = body.get("weight_version")
        if body.get("abort_all_requests"):
            engine.abort(abort_all=True)
        try:
            await asyncio.to_thread(engine.update_weights_from_disk, path, None if version is None else str(version))
        except UsageError as error:
            return JSONResponse({"success": False, "message": str(error), "num_paused_requests": 0}, 400)
        message = f"Weights of {path} in use, version {engine.weight_version}."
        return JSONResponse({"success": True, "message": message, "num_paused_requests": 0})


def _add_router_part(app: FastAPI, own_url: str | None) -> None:
    def url_of(request: Request) -> str:
        return own_url or str(request.base_url).rstrip("/")

    @app.get("/list_workers")
    async def list_workers(request: Request) -> Json:
        return {"urls": [url_of(request)]}

    @app.get("/workers")
    async def workers(request: Request) -> Json:
        return {"workers": [{"url": url_of(request), "worker_type": "regular", "is_healthy": True}]}


# ---- serving ---------------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: whoever runs the event loop decides what SIGINT means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def serve_in_loop(
    app: FastAPI, host: str, port: int, *, flag: str = "--sglang-router-port"
) -> AsyncIterator[str]:
    """Serve `app` in the running event loop for the duration of the block; yields its URL.

    Example::

        async with serve_in_loop(create_app(engine), "127.0.0.1", 0) as url:
            register_local_engine(url, engine)
    """
    async with serve_on(app, bind_port(host, port, flag=flag)) as url:
        yield url


@contextlib.asynccontextmanager
async def serve_on(app: FastAPI, listener: socket.socket) -> AsyncIterator[str]:
    """The same on a socket that listens already; it is closed at the end."""
    host = listener.getsockname()[0]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name=f"miles-serve-{url}")
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if serving.done():
            serving.result()
            raise EngineError(f"the server of {url} ended while it started.")
        yield url
    finally:
        server.should_exit = True
        await serving
        listener.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miles serve", description="Serve a Hugging Face folder with the embedded engine, over SGLang's HTTP API."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder (Llama, Qwen2, Qwen3)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=30000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--max-running-requests", type=int, default=256, metavar="N", help="requests in one batch")
    parser.add_argument("--max-total-tokens", type=int, metavar="N", help="tokens in the cache (default: by memory)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored in the folder")
    parser.add_argument("--device", default="cpu", help="torch device, for instance cuda:0")
    parser.add_argument("--seed", type=int, default=0, help="seed of requests that bring none")
    return parser


def main(argv: Sequence[str]) -> int:
    """`miles serve`: load, print the address, serve until SIGINT or SIGTERM. Returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        if options.max_running_requests < 1:
            raise FlagError("--max-running-requests", given=options.max_running_requests, expected="a number >= 1")
        if options.max_total_tokens is not None and options.max_total_tokens < 2:
            raise FlagError("--max-total-tokens", given=options.max_total_tokens, expected="a number >= 2")
        listener = bind_port(options.host, options.port, flag="--port")
        with listener:
            _serve(options, listener)
    except UsageError as error:
        print(f"miles serve: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _serve(options: argparse.Namespace, listener: socket.socket) -> None:
    import torch

    engine = in_passing_thread(
        lambda: EmbeddedEngine.from_folder(
            options.model,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            device=options.device,
            max_running_requests=options.max_running_requests,
            max_total_tokens=options.max_total_tokens,
            seed=options.seed,
        )
    )
    host, port = listener.getsockname()[:2]
    print(f"Serving {options.model} at http://{host}:{port} (stop with Ctrl-C)", flush=True)
    config = uvicorn.Config(create_app(engine), log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        engine.close()
