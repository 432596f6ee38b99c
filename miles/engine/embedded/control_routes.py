"""What the engine's server says about itself, and what it can be told besides weights: abort, pause, flush, memory."""

from __future__ import annotations

import asyncio
import os
import time

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from miles import __version__
from miles.engine.embedded import bodies
from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.embedded.exact import ExactModel
from miles.engine.embedded.generate_routes import Load
from miles.engine.embedded.http import Limits, json_response, read_model
from miles.engine.embedded.weight_routes import described
from miles.engine.protocol import BadRequestError, Json

STARTED = time.time()


def add_information(app: FastAPI, engine: EmbeddedEngine, limits: Limits, load: Load) -> None:
    @app.get("/health", summary="The server answers")
    async def health() -> Response:
        return Response()

    @app.get("/get_model_info", summary="The model and its weight version")
    @app.get("/model_info", include_in_schema=False)
    async def model_info() -> Json:
        return {
            "model_path": engine.model_path,
            "served_model_name": engine.model_path,
            "tokenizer_path": engine.model_path,
            "is_generation": True,
            "weight_version": engine.weight_version,
            "model_type": engine.hf_config.model_type,
            "architectures": engine.hf_config.architectures,
            "has_image_understanding": False,
            "has_audio_understanding": False,
        }

    @app.get("/get_server_info", summary="Settings and state")
    @app.get("/server_info", include_in_schema=False)
    async def server_info() -> Json:
        return {
            "version": __version__,
            "engine": "miles embedded",
            "model_path": engine.model_path,
            "tokenizer_path": engine.model_path,
            "skip_tokenizer_init": engine.tokenizer is None,
            "context_length": engine.context_length,
            "max_running_requests": engine.max_running_requests,
            "max_queued_requests": limits.queued_requests,
            "max_total_num_tokens": engine.max_total_tokens,
            "dtype": str(engine.model.dtype).removeprefix("torch."),
            "device": str(engine.model.device),
            "random_seed": engine.seed,
            "tp_size": 1,
            "dp_size": 1,
            "pp_size": 1,
            "ep_size": 1,
            "nnodes": 1,
            "node_rank": 0,
            "num_experts": engine.model.shape.num_experts,
            "enable_return_routed_experts": engine.model.shape.num_experts > 0,
            "true_on_policy": isinstance(engine.model, ExactModel),
            "weight_version": engine.weight_version,
            "pid": os.getpid(),
            "startup_time": STARTED,
            "status": "ready",
            **_state(engine, load),
        }

    @app.get("/get_weight_version", summary="The version that new tokens are sampled under")
    @app.get("/weight_version", include_in_schema=False)
    async def weight_version() -> Json:
        return {"weight_version": engine.weight_version}


def _state(engine: EmbeddedEngine, load: Load) -> Json:
    return {
        "num_unfinished_requests": engine.num_unfinished,
        "num_running_requests": engine.num_running,
        "num_requests_in_server": load.inside,
        "num_steps": engine.num_steps,
        "paused": engine.paused,
        "released": sorted(engine.released),
        "weights_missing": engine.weights_missing,
        "last_error": engine.last_error,
    }


def add_control_routes(app: FastAPI, engine: EmbeddedEngine, limits: Limits) -> None:
    @app.post("/abort_request", summary="End requests with what they have", openapi_extra=described(bodies.AbortBody))
    async def abort_request(request: Request) -> Response:
        body = await read_model(request, bodies.AbortBody, limits)
        engine.abort(body.rid, abort_all=body.abort_all)
        return Response()

    @app.post("/flush_cache", summary="Forget shared prefixes")
    @app.get("/flush_cache", include_in_schema=False)
    async def flush_cache() -> Response:
        if not await asyncio.to_thread(engine.flush_cache):
            raise BadRequestError("flush_cache: requests are running. Abort them or wait, then flush.")
        return PlainTextResponse("Cache flushed.\n")

    @app.post("/pause_generation", summary="Stop generating", openapi_extra=described(bodies.PauseBody))
    async def pause_generation(request: Request) -> Json:
        body = await read_model(request, bodies.PauseBody, limits)
        await asyncio.to_thread(engine.pause, body.mode)
        return {"status": "ok", "message": "Generation paused."}

    @app.post("/continue_generation", summary="Go on", openapi_extra=described(bodies.ContinueBody))
    async def continue_generation(request: Request) -> Json:
        await read_model(request, bodies.ContinueBody, limits)
        await asyncio.to_thread(engine.resume)
        return {"status": "ok", "message": "Generation continued."}

    @app.post("/release_memory_occupation", summary="Give memory back", openapi_extra=described(bodies.MemoryBody))
    @app.get("/release_memory_occupation", include_in_schema=False)
    async def release_memory(request: Request) -> Response:
        body = await read_model(request, bodies.MemoryBody, limits)
        await asyncio.to_thread(engine.release_memory, body.tags)
        return json_response({"success": True, "released": sorted(engine.released)})

    @app.post("/resume_memory_occupation", summary="Take memory again", openapi_extra=described(bodies.MemoryBody))
    @app.get("/resume_memory_occupation", include_in_schema=False)
    async def resume_memory(request: Request) -> Response:
        body = await read_model(request, bodies.MemoryBody, limits)
        await asyncio.to_thread(engine.resume_memory, body.tags)
        missing = engine.weights_missing
        message = "The weights are missing until the next update." if missing else "Ready."
        return json_response({"success": True, "released": sorted(engine.released), "message": message})


def add_router_part(app: FastAPI, own_url: str | None) -> None:
    """A run's own server is asked for engines as a router would be."""

    def url_of(request: Request) -> str:
        return own_url or str(request.base_url).rstrip("/")

    @app.get("/list_workers", summary="This server")
    async def list_workers(request: Request) -> Json:
        return {"urls": [url_of(request)]}

    @app.get("/workers", summary="This server, as a router lists its engines")
    async def workers(request: Request) -> Json:
        return {"workers": [{"url": url_of(request), "worker_type": "regular", "is_healthy": True}]}
