"""The bodies of the control endpoints, field by field as SGLang 0.5.23 has them; `/openapi.json` is made from them.

A field that SGLang has and that means nothing here (there is no draft model, no quantised weight, no CUDA graph) may
only ask for nothing. `/generate` is checked by `miles/engine/protocol.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Version = str | int | None
"""A weight version: any text. A number is taken for its digits, None keeps the version's name."""

Size = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AbortBody(Body):
    """One request (with the `<rid>_<i>` of a batch), or all. A request that is not there is no error."""

    rid: str | None = None
    abort_all: bool = False
    abort_message: str | None = None


class PauseBody(Body):
    """`abort` ends requests, `retract` computes their caches anew later, `in_place` keeps them."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class ContinueBody(Body):
    torch_empty_cache: bool = True


class MemoryBody(Body):
    """None: everything."""

    tags: list[Literal["kv_cache", "weights", "cuda_graph"]] | None = None


class WeightsBody(Body):
    """What every weight update says. Prefixes of old weights are forgotten whether `flush_cache` asks for it or not."""

    weight_version: Version = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    torch_empty_cache: bool = False


class DiskBody(WeightsBody):
    model_path: str
    load_format: Literal["auto", "safetensors"] | None = None
    is_async: Literal[False] = False
    keep_pause: bool = False
    recapture_cuda_graph: bool = False
    token_step: int = 0
    manifest: None = None


class TensorBody(WeightsBody):
    """`serialized_named_tensors`: one safetensors file in base64. The same file can be the body itself
    (application/octet-stream), with the other fields in the query."""

    serialized_named_tensors: list[str] = Field(min_length=1)
    load_format: str | None = None
    selector: Literal["target", "all"] = "all"


class RawTensorQuery(WeightsBody):
    """The query of a `/update_weights_from_tensor` whose body is a safetensors file."""

    weight_version: str | None = None


class SharedMemoryBody(Body):
    weight_version: Version = None
    flush_cache: bool = True


class DistributedBody(WeightsBody):
    """`load_format` `flattened_bucket`: rank 0 broadcasts the bytes of all tensors as one."""

    names: list[str] = Field(min_length=1)
    dtypes: list[str]
    shapes: list[list[Size]]
    group_name: str = "weight_update_group"
    load_format: Literal["flattened_bucket"] | None = None
    selector: Literal["target", "all"] = "all"


class JoinBody(Body):
    master_address: str
    master_port: int = Field(ge=1, le=65535)
    rank_offset: int = Field(ge=0)
    world_size: int = Field(ge=1)
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class LeaveBody(Body):
    group_name: str = "weight_update_group"


class BeginBody(Body):
    selector: Literal["target", "all"] = "all"


class EndBody(Body):
    pass


class CheckBody(Body):
    """`skip_tensor_list`: parts of the names of parameters that are left out."""

    action: Literal["snapshot", "reset_tensors", "compare", "checksum"] = "checksum"
    allow_quant_error: bool = False
    skip_tensor_list: list[str] | None = None
    selector: Literal["target", "all"] = "all"


class ByNameBody(Body):
    name: str
    truncate_size: int = Field(100, ge=0)


class VersionBody(Body):
    new_version: str
    abort_all_requests: bool = True


class PostProcessBody(Body):
    restore_weights_before_load: bool = False
    post_process_quantization: bool = False
