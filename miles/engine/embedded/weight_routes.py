"""Weights over HTTP: from a folder, from shared memory, from a body, from a process group; looked at, and compared.

    /update_weights_from_disk              a folder that this machine can read
    /update_weights_from_shared_memory     the memory that was inherited (`--weights-fd`) has been rewritten
    /update_weights_from_tensor            safetensors in the body; SGLang's pickles are refused
    /update_weights_from_distributed       a broadcast in a group of /init_weights_update_group

The last two may come in parts between /begin_weight_update and /end_weight_update (`weight_session.py`). Updates are
done one at a time. Those that fail answer `"success": false` with status 400 and leave weights and version as they are.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import torch
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from torch import Tensor

from miles.engine.embedded import bodies
from miles.engine.embedded.checker import overall, shown
from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.embedded.http import Limits, checked, decoded, error_body, json_response, read_body
from miles.engine.embedded.loading import in_passing_thread
from miles.engine.embedded.weight_groups import WeightGroups
from miles.engine.embedded.weight_session import WeightSession
from miles.engine.protocol import BadRequestError, Json
from miles.errors import EngineError, UsageError
from miles.weights.shared_memory import dtype_named

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)

ReadShared = Callable[[], Mapping[str, Tensor]]
"""The tensors of an inherited memory, on the engine's device."""

NO_PICKLE = (
    "load_format {given!r}: this engine takes 'safetensors' only. SGLang's tensors are a pickle, which runs the code "
    "of whoever sent it and is never read from the network here. Send safetensors in base64 with load_format "
    "'safetensors', or as the body itself (content-type application/octet-stream)."
)


class Weights:
    """What the endpoints share: one update at a time, and the answers of those that fail."""

    def __init__(self, engine: EmbeddedEngine, limits: Limits, shared: ReadShared | None) -> None:
        self.engine, self.limits, self.shared = engine, limits, shared
        self.session = WeightSession(engine, limits.weights_timeout_s)
        self.groups = WeightGroups(engine.model.device, limits.weights_timeout_s)
        self._one_at_a_time = asyncio.Lock()

    async def body(self, request: Request, model: type[B], *, limit: int | None = 0) -> B:
        """The checked body; `limit` None: as large as it comes, 0: as any other body."""
        most = self.limits.body_bytes if limit == 0 else limit
        return checked(model, decoded(await read_body(request, most, self.limits.body_patience_s)))

    async def answer(self, work: Callable[[], Awaitable[str]]) -> Response:
        """`work` returns the message of the answer."""
        try:
            async with asyncio.timeout(self.limits.weights_timeout_s):
                await self._one_at_a_time.acquire()
        except TimeoutError as error:
            raise EngineError(
                f"another weight update has been under way for {self.limits.weights_timeout_s:g} s.", status=503
            ) from error
        try:
            message = await work()
        except (EngineError, UsageError) as error:
            self.engine.last_error = str(error)
            body = {"success": False, "message": str(error), "num_paused_requests": 0, **error_body(str(error), 400)}
            return json_response(body, 400)
        finally:
            self._one_at_a_time.release()
        return json_response({"success": True, "message": message, "num_paused_requests": 0})

    async def take(self, tensors: Mapping[str, Tensor], body: bodies.WeightsBody) -> str:
        """Tensors that came over the network."""
        self.prepare(body)
        message = await self.session.add(tensors, version_of(body.weight_version))
        self.finish(body)
        return message

    def prepare(self, body: bodies.WeightsBody) -> None:
        if body.abort_all_requests:
            self.engine.abort(abort_all=True)

    def finish(self, body: bodies.WeightsBody) -> None:
        if body.torch_empty_cache and self.engine.model.device.type == "cuda":
            torch.cuda.empty_cache()


def version_of(given: bodies.Version) -> str | None:
    return None if given is None else str(given)


async def apart(work: Callable[[], T]) -> T:
    """Run what blocks in a thread of its own, which leaves no team of workers behind."""
    return await asyncio.to_thread(in_passing_thread, work)


def described(model: type[BaseModel]) -> Json:
    """For `openapi_extra`: the JSON body of an endpoint that reads it itself."""
    return {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}


def add_weight_routes(app: FastAPI, engine: EmbeddedEngine, limits: Limits, shared: ReadShared | None) -> Weights:
    """Returns what the endpoints share, for whoever has to end it with the server."""
    weights = Weights(engine, limits, shared)

    _add_local(app, weights)
    _add_tensor(app, weights)
    _add_distributed(app, weights)
    _add_inspection(app, weights)
    return weights


def _add_local(app: FastAPI, weights: Weights) -> None:
    engine = weights.engine

    @app.post(
        "/update_weights_from_disk", summary="Weights of a folder", openapi_extra=described(bodies.DiskBody)
    )
    async def from_disk(request: Request) -> Response:
        body = await weights.body(request, bodies.DiskBody)

        async def work() -> str:
            weights.prepare(body)
            version = version_of(body.weight_version)
            await apart(lambda: engine.update_weights_from_disk(body.model_path, version))
            weights.finish(body)
            return f"Weights of {body.model_path} in use, version {engine.weight_version}."

        return await weights.answer(work)

    @app.post(
        "/update_weights_from_shared_memory",
        summary="The inherited memory has been rewritten",
        openapi_extra=described(bodies.SharedMemoryBody),
    )
    async def from_shared_memory(request: Request) -> Response:
        body = await weights.body(request, bodies.SharedMemoryBody)

        async def work() -> str:
            shared = weights.shared
            if shared is None:
                raise BadRequestError(
                    "update_weights_from_shared_memory: this server was started without --weights-fd, it shares no "
                    "memory with anybody."
                )
            if engine.num_unfinished and not engine.paused:
                raise BadRequestError(
                    f"update_weights_from_shared_memory: {engine.num_unfinished} requests are being generated while "
                    "the memory changes. Call /pause_generation before it is written."
                )
            await apart(lambda: engine.update_weights_from(shared, version_of(body.weight_version)))
            return f"Weights of the shared memory in use, version {engine.weight_version}."

        return await weights.answer(work)

    @app.post("/update_weight_version", summary="Rename the weights", openapi_extra=described(bodies.VersionBody))
    async def update_weight_version(request: Request) -> Response:
        body = await weights.body(request, bodies.VersionBody)

        async def work() -> str:
            if body.abort_all_requests:
                engine.abort(abort_all=True)
            await asyncio.to_thread(engine.rename_weights, body.new_version)
            return f"Weight version updated to {body.new_version}."

        return await weights.answer(work)


def _add_tensor(app: FastAPI, weights: Weights) -> None:
    limits = weights.limits

    @app.post(
        "/update_weights_from_tensor", summary="safetensors in the body", openapi_extra=described(bodies.TensorBody)
    )
    async def from_tensor(request: Request) -> Response:
        if request.headers.get("content-type", "").startswith("application/octet-stream"):
            body: bodies.WeightsBody = raw_query(request)
            raw = await read_body(request, None, limits.body_patience_s)
        else:
            body, raw = await weights.body(request, bodies.TensorBody, limit=None), b""

        async def work() -> str:
            data = raw or _unpacked(body)
            return await weights.take(await apart(lambda: _from_safetensors(data)), body)

        return await weights.answer(work)

    @app.post("/begin_weight_update", summary="Weights follow in parts", openapi_extra=described(bodies.BeginBody))
    async def begin(request: Request) -> Response:
        await weights.body(request, bodies.BeginBody)

        async def work() -> str:
            weights.session.begin()
            return "Success"

        return await weights.answer(work)

    @app.post("/end_weight_update", summary="All parts are there", openapi_extra=described(bodies.EndBody))
    async def end(request: Request) -> Response:
        await weights.body(request, bodies.EndBody)
        return await weights.answer(weights.session.end)

    @app.post(
        "/post_process_weights",
        summary="For quantised weights, of which this engine has none",
        openapi_extra=described(bodies.PostProcessBody),
    )
    async def post_process(request: Request) -> Response:
        await weights.body(request, bodies.PostProcessBody)
        return json_response({"success": True, "message": "These weights are not quantised: nothing to do."})


def raw_query(request: Request) -> bodies.RawTensorQuery:
    flags = {"true": True, "1": True, "false": False, "0": False}
    query: Json = {
        name: value if name == "weight_version" else flags.get(value.lower(), value)
        for name, value in request.query_params.items()
    }
    return checked(bodies.RawTensorQuery, query)


def _unpacked(body: bodies.WeightsBody) -> bytes:
    """The safetensors file in a JSON body."""
    if not isinstance(body, bodies.TensorBody):
        raise BadRequestError("update_weights_from_tensor: the body is empty.")
    if body.load_format != "safetensors":
        raise BadRequestError(f"update_weights_from_tensor: {NO_PICKLE.format(given=body.load_format)}")
    if len(body.serialized_named_tensors) != 1:
        raise BadRequestError(
            "serialized_named_tensors: this engine is one process and takes one entry, got "
            f"{len(body.serialized_named_tensors)}."
        )
    try:
        return base64.b64decode(body.serialized_named_tensors[0], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"serialized_named_tensors: not base64: {error}.") from error


def _from_safetensors(data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadRequestError(f"update_weights_from_tensor: these bytes are no safetensors file: {error}.") from error


def _add_distributed(app: FastAPI, weights: Weights) -> None:
    groups = weights.groups

    @app.post("/init_weights_update_group", summary="Join a process group", openapi_extra=described(bodies.JoinBody))
    async def join(request: Request) -> Response:
        body = await weights.body(request, bodies.JoinBody)

        async def work() -> str:
            await apart(
                lambda: groups.join(
                    body.group_name,
                    host=body.master_address,
                    port=body.master_port,
                    rank=body.rank_offset,
                    size=body.world_size,
                    backend=body.backend,
                )
            )
            return f"Rank {body.rank_offset} of {body.world_size} in group {body.group_name!r}."

        return await weights.answer(work)

    @app.post(
        "/destroy_weights_update_group", summary="Leave a process group", openapi_extra=described(bodies.LeaveBody)
    )
    async def leave(request: Request) -> Response:
        body = await weights.body(request, bodies.LeaveBody)

        async def work() -> str:
            await apart(lambda: groups.leave(body.group_name))
            return f"Left group {body.group_name!r}."

        return await weights.answer(work)

    @app.post(
        "/update_weights_from_distributed",
        summary="Receive a broadcast of rank 0",
        openapi_extra=described(bodies.DistributedBody),
    )
    async def from_distributed(request: Request) -> Response:
        body = await weights.body(request, bodies.DistributedBody)

        async def work() -> str:
            shapes = _shapes(body)
            weights.session.check(
                {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
            )
            flattened = body.load_format == "flattened_bucket"
            received = await apart(lambda: groups.receive(body.group_name, shapes, flattened=flattened))
            return await weights.take(received, body)

        return await weights.answer(work)


def _shapes(body: bodies.DistributedBody) -> dict[str, tuple[list[int], torch.dtype]]:
    if not len(body.names) == len(body.dtypes) == len(body.shapes):
        raise BadRequestError(
            f"update_weights_from_distributed: {len(body.names)} names, {len(body.dtypes)} dtypes and "
            f"{len(body.shapes)} shapes; expected as many of each."
        )
    try:
        return {n: (shape, dtype_named(dtype)) for n, dtype, shape in zip(body.names, body.dtypes, body.shapes)}
    except ValueError as error:
        raise BadRequestError(f"dtypes: {error}.") from error


def _add_inspection(app: FastAPI, weights: Weights) -> None:
    engine = weights.engine

    @app.api_route(
        "/weights_checker",
        methods=["POST"],
        summary="Snapshot, reset and compare the weights",
        openapi_extra=described(bodies.CheckBody),
    )
    @app.get("/weights_checker", include_in_schema=False)
    async def weights_checker(request: Request) -> Response:
        body = await weights.body(request, bodies.CheckBody)
        skip = body.skip_tensor_list or []
        checker = engine.checker
        if body.action == "snapshot":
            num = await asyncio.wrap_future(engine.submit(checker.snapshot))
            return json_response({"success": True, "message": f"{num} parameters remembered."})
        if body.action == "reset_tensors":
            num = await asyncio.wrap_future(engine.submit(lambda: checker.reset(skip)))
            return json_response({"success": True, "message": f"{num} parameters are random numbers now."})
        if body.action == "compare":
            differences = await asyncio.wrap_future(engine.submit(lambda: checker.compare(skip)))
            if differences:
                message = f"weights_checker: {shown(differences)}"
                return json_response({"success": False, "message": message, **error_body(message, 400)}, 400)
            return json_response({"success": True, "message": "All parameters equal the snapshot."})
        checksums = await asyncio.wrap_future(engine.submit(lambda: checker.checksums(skip)))
        ranks = [{"checksums": checksums, "per_gpu_checksum": overall(checksums), "parallelism_info": []}]
        total = {"ranks": ranks, "per_engine_checksum": overall(checksums)}
        return json_response({"success": True, "message": "Success.", **total})

    @app.api_route(
        "/get_weights_by_name",
        methods=["POST"],
        summary="Values of one parameter",
        openapi_extra=described(bodies.ByNameBody),
    )
    @app.get("/get_weights_by_name", include_in_schema=False)
    async def get_weights_by_name(request: Request) -> Response:
        body = await weights.body(request, bodies.ByNameBody)

        def read() -> list[Any]:
            tensor = engine.model.named.get(body.name)
            if tensor is None:
                raise BadRequestError(
                    f"get_weights_by_name: {body.name[:200]!r} is no weight of this model, which has "
                    f"{len(engine.model.named)} others."
                )
            values: list[Any] = tensor[: body.truncate_size].float().cpu().tolist()
            return values

        return json_response(await asyncio.wrap_future(engine.submit(read)))
