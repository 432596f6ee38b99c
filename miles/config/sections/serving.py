"""The engines and the way to them.

SGLang's own server flags come as `--sglang-<flag>`. The ones that matter are declared here; every other one lands on
`args` as it is (`miles.config.passthrough`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miles.config.flags import (
    PATH,
    PORT,
    Section,
    Status,
    above,
    at_least,
    between,
    by_engine,
    flag,
    more_than,
    no_meaning_here,
    not_built,
)

PARALLEL = "Computing on several devices"
THEIRS = no_meaning_here("it is set where the external engines are started.")
TRAINER_WEIGHTS = no_meaning_here("the embedded engine uses the trainer's model as it is.")

# Flags of SGLang's servers that the embedded engine has no use for, ...
OF_SGLANG = by_engine(
    embedded=no_meaning_here("it belongs to SGLang; the embedded engine has no such setting."), external=THEIRS
)
OF_SGLANG_WEIGHTS = by_engine(embedded=TRAINER_WEIGHTS, external=THEIRS)
# ... that both have, ...
OF_BOTH = by_engine(external=THEIRS)


def of_sglang_alone(what: str, when: Callable[[Any], bool] | None = None) -> Status:
    """... and that change what is computed, so that the embedded engine must refuse them."""
    return by_engine(embedded=not_built(f"{what} of the embedded engine", when=when), external=THEIRS)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """What generates, and where it is reached.

    `sglang_router_ip` and `sglang_router_port` on `args` are where plug-ins send their requests.
    """

    sglang_python: str | None = flag(
        None, "Python of the environment that SGLang is installed in; this one when unset.", check=PATH
    )
    sglang_router_ip: str | None = flag(None, "Address of a router that is already running.")
    sglang_router_port: int | None = flag(
        None, "Port where this run serves SGLang's HTTP API; a free one when unset.", check=PORT
    )
    sglang_router_request_timeout_secs: int = flag(14400, "Seconds that a request may take.", check=at_least(1))
    sglang_server_concurrency: int = flag(512, "Requests in flight per engine.", check=at_least(1))
    sglang_context_length: int | None = flag(
        None, "Most tokens of a request; the model's own limit when unset.", check=at_least(2), status=OF_BOTH
    )
    sglang_max_running_requests: int | None = flag(
        None, "Requests that are decoded together; the others wait.", check=at_least(1), status=OF_BOTH
    )
    sglang_max_total_tokens: int | None = flag(
        None, "Most tokens in the KV cache; a share of the free memory when unset.", check=at_least(2), status=OF_BOTH
    )
    sglang_enable_deterministic_inference: bool = flag(False, "Give every sample a seed of its own.")
    sglang_mem_fraction_static: float | None = flag(
        None, "Part of the GPU memory for weights and cache.", check=between(0, 1), status=OF_SGLANG
    )
    sglang_chunked_prefill_size: int | None = flag(
        None, "Tokens of a prompt that are processed at a time.", status=OF_SGLANG
    )
    sglang_dtype: str = flag("auto", "Number format of the weights.", status=OF_SGLANG_WEIGHTS)
    sglang_kv_cache_dtype: str = flag("auto", "Number format of the cache.", status=OF_SGLANG_WEIGHTS)
    sglang_quantization: str | None = flag(None, "Quantization of the weights.", status=of_sglang_alone("Quantization"))
    sglang_attention_backend: str | None = flag(None, "Attention kernels of the engine.", status=OF_SGLANG)
    sglang_sampling_backend: str | None = flag(None, "Sampling kernels of the engine.", status=OF_SGLANG)
    sglang_disable_cuda_graph: bool = flag(False, "Run without CUDA graphs.", status=OF_SGLANG)
    sglang_cuda_graph_max_bs: int | None = flag(
        None, "Largest batch with a CUDA graph.", check=at_least(1), status=OF_SGLANG
    )
    sglang_disable_radix_cache: bool = flag(False, "Do not share prefixes between requests.", status=OF_SGLANG)
    sglang_log_level: str = flag("info", "How much a server logs.", status=OF_SGLANG)
    sglang_speculative_algorithm: str | None = flag(
        None, "Speculative decoding.", status=of_sglang_alone("Speculative decoding")
    )
    sglang_speculative_num_steps: int | None = flag(
        None, "Steps of the draft model.", status=of_sglang_alone("Speculative decoding")
    )
    sglang_speculative_eagle_topk: int | None = flag(
        None, "Branches of the draft tree.", status=of_sglang_alone("Speculative decoding")
    )
    sglang_speculative_num_draft_tokens: int | None = flag(
        None, "Tokens of a draft.", status=of_sglang_alone("Speculative decoding")
    )
    sglang_data_parallel_size: int = flag(
        1,
        "Replicas inside one engine.",
        aliases=("--sglang-dp-size",),
        check=at_least(1),
        status=of_sglang_alone(PARALLEL, above(1)),
    )
    sglang_pipeline_parallel_size: int = flag(
        1,
        "Pipeline stages of one engine.",
        aliases=("--sglang-pp-size",),
        check=at_least(1),
        status=of_sglang_alone(PARALLEL, above(1)),
    )
    sglang_expert_parallel_size: int = flag(
        1,
        "Devices that share the experts of one engine.",
        aliases=("--sglang-ep-size",),
        check=at_least(1),
        status=of_sglang_alone(PARALLEL, above(1)),
    )
    sglang_enable_dp_attention: bool = flag(
        False, "Attention on replicas of their own.", status=of_sglang_alone(PARALLEL)
    )


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Section):
    """MilesRouter, between requests and engines."""

    use_miles_router: bool = flag(False, "Route requests through MilesRouter.")
    miles_router_timeout: float | None = flag(None, "Seconds that a routed request may take.", check=more_than(0))
    miles_router_max_connections: int | None = flag(None, "Requests on their way at once.", check=at_least(1))
    miles_router_health_check_failure_threshold: int = flag(
        3, "Failed health checks after which an engine gets no requests.", check=at_least(1)
    )
    miles_router_enable_token_input_for_chat_completions: bool = flag(
        False, "Sessions render every chat in the router; without it those that begin anew are left to the engine."
    )


@dataclass(frozen=True, kw_only=True)
class PDConfig(Section):
    """Prefill and decoding on separate servers."""

    prefill_num_servers: int | None = flag(
        None, "Servers that only prefill.", check=at_least(1), status=not_built("Disaggregated prefill")
    )
