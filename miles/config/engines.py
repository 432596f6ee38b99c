"""Which engines generate, how many, and where they live: decided before anything starts.

    embedded   ours: in the run's process where there is one and nobody has to restart it, else server processes
    sglang     SGLang servers on the GPUs of this machine (or on its cores, to try things out)
    external   servers that someone else started

What each of them is started with is left to `miles.engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from urllib.parse import urlsplit

from miles.config import passthrough, sglang_flags
from miles.config.draft import Draft
from miles.config.sections import FLAGS
from miles.errors import FlagError

ENGINES = ("embedded", "sglang", "external")


def kind(draft: Draft) -> str:
    """One of ENGINES."""
    if draft["rollout_external"]:
        return "external"
    if draft["rollout_engine"] != "auto":
        return str(draft["rollout_engine"])
    usable = draft.gpus > 0 and (draft["sglang_python"] is not None or find_spec("sglang") is not None)
    return "sglang" if usable else "embedded"


def choose(draft: Draft) -> None:
    """Settle `rollout_engine` and the number of engines."""
    if draft["rollout_external_engine_addrs"] is not None and not draft["rollout_external"]:
        raise FlagError("--rollout-external-engine-addrs", given="needs --rollout-external.")
    if draft["rollout_external"]:
        _external(draft)
        return
    draft.derive("rollout_engine", kind(draft))
    gpus, each = draft["rollout_num_gpus"], draft["rollout_num_gpus_per_engine"]
    if gpus % each:
        raise FlagError(
            "--rollout-num-gpus", given=gpus, expected=f"a multiple of --rollout-num-gpus-per-engine {each}"
        )
    if draft["rollout_engine"] == "embedded":
        _embedded(draft)
    elif draft.gpus and gpus > draft.gpus:
        raise FlagError("--rollout-num-gpus", given=gpus, expected=f"at most {draft.gpus}, the GPUs of this machine")


def _embedded(draft: Draft) -> None:
    if draft["rollout_num_gpus_per_engine"] > 1:
        raise FlagError(
            "--rollout-num-gpus-per-engine",
            given=draft["rollout_num_gpus_per_engine"],
            expected="1 with --rollout-engine embedded, which computes on one device",
            remedy="Use --rollout-engine sglang, or several engines (--rollout-num-gpus).",
        )
    if draft.gpus and in_processes(draft["rollout_engine"], draft["rollout_num_gpus"], draft["use_fault_tolerance"]):
        flag = "--use-fault-tolerance" if draft["use_fault_tolerance"] else "--rollout-num-gpus"
        raise FlagError(
            flag,
            given="embedded engines in processes of their own compute on a CPU, and this machine has a GPU.",
            remedy="Use --rollout-engine sglang.",
        )


def _external(draft: Draft) -> None:
    if draft["rollout_engine"] not in ("auto", "external"):
        raise FlagError("--rollout-external", given=f"excludes --rollout-engine {draft['rollout_engine']}.")
    addresses = draft["rollout_external_engine_addrs"]
    if not addresses:
        raise FlagError("--rollout-external", given="needs --rollout-external-engine-addrs HOST:PORT ...")
    urls = [url_of(address) for address in addresses]
    twice = next((url for url in urls if urls.count(url) > 1), None)
    if twice is not None:
        raise FlagError("--rollout-external-engine-addrs", given=f"{twice} is named twice.")
    draft.derive("rollout_engine", "external")
    draft.derive("rollout_num_gpus", len(urls) * draft["rollout_num_gpus_per_engine"])


def url_of(address: str) -> str:
    """`host:port` as a URL; a URL stays. Raises FlagError.

    Example: `url_of("10.0.0.7:30000") == "http://10.0.0.7:30000"`
    """
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    try:
        fits = parts.scheme == "http" and bool(parts.hostname) and parts.port is not None
    except ValueError:  # a port that is no number
        fits = False
    if not fits or parts.path.strip("/") or parts.query:
        raise FlagError(
            "--rollout-external-engine-addrs", given=address, expected="HOST:PORT, for instance 10.0.0.7:30000"
        )
    return url.rstrip("/")


def in_processes(engine: str, count: int, fault_tolerance: bool) -> bool:
    """Whether engines are reached over HTTP: all but a single embedded one that is never restarted."""
    return engine != "embedded" or count > 1 or fault_tolerance


def check(draft: Draft) -> None:
    """What the chosen engines cannot do, and flags that nobody reads with them."""
    if draft["debug_train_only"]:
        return
    engine = draft["rollout_engine"]
    own_processes = in_processes(engine, draft["rollout_num_gpus"], draft["use_fault_tolerance"])
    if draft["true_on_policy_mode"] and engine != "embedded":
        raise FlagError("--true-on-policy-mode", given=f"needs --rollout-engine embedded, not {engine}.")
    if draft["sglang_router_ip"] is not None and not own_processes:
        raise FlagError(
            "--sglang-router-ip",
            given="the embedded engine of this run is inside its process, where another router cannot count on it.",
            remedy="Leave the flag out, or start engines in processes of their own (--rollout-num-gpus 2).",
        )
    if draft["sglang_router_ip"] is not None and draft["sglang_router_port"] is None:
        raise FlagError("--sglang-router-ip", given="needs --sglang-router-port.")
    if draft["sglang_router_ip"] is not None and draft["use_rollout_routing_replay"]:
        draft.notices.append(
            "--use-rollout-routing-replay: SGLang's own router drops the request for routed experts; the router at "
            "--sglang-router-ip must be a MilesRouter."
        )
    for first, why in EXCLUDED_BY_ROUTER_IP.items():
        if draft["sglang_router_ip"] is not None and draft.given(first) and draft[first]:
            raise FlagError("--sglang-router-ip", given=f"excludes {draft.option(first)}: {why}")
    _passed_flags(draft)
    for names, is_read, why in READ_WHEN:
        for name in names:
            if draft.given(name) and draft[name] is not None and not is_read(draft, own_processes):
                draft.notices.append(f"{draft.option(name)}: no meaning here, {why}")


def _passed_flags(draft: Draft) -> None:
    """SGLang's flags must be SGLang's; without its servers nobody reads them. The Rust router checks its own."""
    engine = draft["rollout_engine"]
    for name in draft.passed:
        if engine != "sglang" or not name.startswith(sglang_flags.PREFIX):
            draft.notices.append(passthrough.notice(name, [f.option for f in FLAGS.values()], engine))
        elif (unknown := sglang_flags.check(name, draft.extras[name])) is not None:
            draft.notices.append(unknown)
    if engine == "sglang":
        for name, flag in FLAGS.items():
            if draft.given(name) and flag.name.startswith(sglang_flags.PREFIX) and sglang_flags.find(name) is not None:
                sglang_flags.check(name, draft[name])
        _parallel(draft)


def _parallel(draft: Draft) -> None:
    gpus, stages = draft["rollout_num_gpus_per_engine"], draft["sglang_pipeline_parallel_size"]
    if gpus % stages:
        raise FlagError(
            "--sglang-pipeline-parallel-size",
            given=stages,
            expected=f"a divisor of --rollout-num-gpus-per-engine {gpus}",
        )
    if draft["sglang_data_parallel_size"] > 1 and not draft["sglang_enable_dp_attention"]:
        raise FlagError(
            f"--sglang-data-parallel-size {draft['sglang_data_parallel_size']}",
            given="needs --sglang-enable-dp-attention.",
            remedy="For several engines use --rollout-num-gpus.",
        )


EXCLUDED_BY_ROUTER_IP = {
    "use_miles_router": "requests go to the router that it names.",
    "miles_router_middleware_paths": "they belong to MilesRouter, and another router runs.",
}

READ_WHEN: list[tuple[tuple[str, ...], Callable[[Draft, bool], bool], str]] = [
    (
        ("rollout_health_check_timeout", "rollout_health_check_first_wait"),
        lambda draft, own: bool(draft["use_fault_tolerance"]),
        "without --use-fault-tolerance.",
    ),
    (
        ("rollout_health_check_interval", "miles_router_health_check_failure_threshold", "miles_router_timeout")
        + ("miles_router_max_connections",),
        lambda draft, own: own or bool(draft["use_miles_router"]),
        "the one engine of this run is inside its process and has no router.",
    ),
    (
        ("update_weight_transport",),
        lambda draft, own: own and draft["rollout_engine"] != "embedded",
        "embedded engines read the trainer's weights in its memory, or in memory that they share with it.",
    ),
    (
        ("sglang_router_request_timeout_secs",),
        lambda draft, own: own,
        "the one engine of this run is inside its process, and nobody gives up waiting for it.",
    ),
    (
        ("colocate", "offload", "offload_rollout"),
        lambda draft, own: own and draft["rollout_engine"] != "external",
        "the engines are none that this run starts beside the trainer.",
    ),
    (
        ("sglang_python",),
        lambda draft, own: draft["rollout_engine"] == "sglang",
        "no SGLang server is started (--rollout-engine).",
    ),
    (
        ("engine_start_timeout_s", "check_weight_update_equal"),
        lambda draft, own: own,
        "the one engine of this run is inside its process, and reads the trainer's own weights.",
    ),
]
"""Flags, when something reads them, and why nothing does otherwise."""
