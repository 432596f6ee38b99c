"""Who generates: the engine inside this process, or a fleet of servers. `launch` sees no difference.

    in this process   one embedded engine on the trainer's own tensors; served on loopback, because plug-ins post there;
                      with --use-miles-router behind a router, which everything then goes through
    a fleet           embedded engines that share one copy of the weights, SGLang servers, or servers of others
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miles.config import RunConfig
from miles.config.engines import in_processes, url_of
from miles.engine import sglang
from miles.engine.client import EngineClient, LocalEngineClient
from miles.engine.embedded.engine import EmbeddedEngine, end_of_sequence_ids, in_passing_thread
from miles.engine.embedded.model import DecoderShape, load_config
from miles.engine.fleet import Fleet, Watching
from miles.engine.fleet_client import FleetClient
from miles.engine.listen import get_host_info
from miles.engine.member import Member
from miles.engine.process import ServerProcess, child_environment, free_port
from miles.rollout.tokenizer import load_tokenizer
from miles.run import serve, trainers
from miles.run.serve import LOOPBACK
from miles.trainer.group import portable
from miles.weights.delivery import Delivery, SharedMemoryDelivery
from miles.weights.disk import DiskDelivery
from miles.weights.distributed import DistributedDelivery
from miles.weights.memory import Memory
from miles.weights.sglang_tensor import TensorDelivery
from miles.weights.shared_memory import anonymous_file

# Requests that decode together; the rest wait. More cost memory for keys and values and gain little on a CPU.
DEFAULT_RUNNING_REQUESTS = 256


@dataclass(frozen=True)
class Generators:
    """`target` is what a trainer suspends and updates; None where nothing is generated or nothing is trained."""

    target: EmbeddedEngine | Fleet | None
    client: EngineClient | None
    seeds_each_sample: bool = True


def start(
    config: RunConfig,
    args: Namespace,
    loaded: trainers.LoadedTrainer | None,
    run_dir: Path,
    stack: ExitStack,
    *,
    resuming: bool = False,
) -> Generators:
    """Start what the run generates with; it ends with `stack`. Writes its address to `args`.

    `resuming`: the first weights are not those of --hf-checkpoint, which engines start with.
    """
    if config.debug.debug_train_only:
        return Generators(None, None)
    _model_facts(config, args)
    count = config.cluster.rollout_num_gpus or 1
    if in_processes(config.rollout.rollout_engine, count, config.fault_tolerance.use_fault_tolerance):
        return _start_fleet(config, args, loaded, run_dir, stack, compare=not resuming)
    engine = _build_engine(config, loaded)
    stack.callback(engine.close)
    if not config.router.use_miles_router:
        host, port = stack.enter_context(serve.on_loopback(engine, config.engine.sglang_router_port))
        args.sglang_router_ip, args.sglang_router_port = host, port
        return Generators(engine, LocalEngineClient(engine, f"http://{host}:{port}"))
    host, port = stack.enter_context(serve.on_loopback(engine, None))
    fleet = Fleet(
        [Member(0, f"http://{host}:{port}")],
        watching(config),
        router_url=_router_url(config, args),
        start_router=_router_launch(config, args, run_dir),
    )
    stack.callback(fleet.close)
    fleet.start()
    return Generators(engine, _client(fleet, config))


def _model_facts(config: RunConfig, args: Namespace) -> None:
    """Facts of the model under the names that Megatron's flags have: who decodes routed experts reads them."""
    shape = DecoderShape.from_config(load_config(str(config.rollout.hf_checkpoint)))
    args.num_layers = shape.num_layers
    if shape.top_k:
        args.moe_router_topk = shape.top_k


# ---- in this process -----------------------------------------------------------------------------------------------


def _build_engine(config: RunConfig, loaded: trainers.LoadedTrainer | None) -> EmbeddedEngine:
    """The embedded engine on the trainer's own tensors, or on the folder's, without a trainer."""
    folder = str(config.rollout.hf_checkpoint)
    options: dict[str, Any] = {
        "max_running_requests": config.engine.sglang_max_running_requests or DEFAULT_RUNNING_REQUESTS,
        "max_total_tokens": config.engine.sglang_max_total_tokens,
        "context_length": config.engine.sglang_context_length,
        "seed": config.run.seed,
        "exact": config.train.true_on_policy_mode,
    }

    def build() -> EmbeddedEngine:
        if loaded is None:
            return EmbeddedEngine.from_folder(folder, **options)
        tokenizer, hf_config = load_tokenizer(folder, trust_remote_code=True), load_config(folder)
        return EmbeddedEngine(
            hf_config,
            loaded.weights(),
            tokenizer,
            eos_token_ids=end_of_sequence_ids(hf_config, tokenizer, folder),
            model_path=folder,
            **options,
        )

    return in_passing_thread(build)


# ---- servers -------------------------------------------------------------------------------------------------------


def watching(config: RunConfig) -> Watching:
    settings = config.fault_tolerance
    return Watching(
        fault_tolerance=settings.use_fault_tolerance,
        interval_s=settings.rollout_health_check_interval,
        timeout_s=settings.rollout_health_check_timeout,
        first_wait_s=settings.rollout_health_check_first_wait,
        start_timeout_s=settings.engine_start_timeout_s,
    )


def _client(fleet: Fleet, config: RunConfig) -> FleetClient:
    return FleetClient(fleet, timeout_s=config.engine.sglang_router_request_timeout_secs)


def _start_fleet(
    config: RunConfig,
    args: Namespace,
    loaded: trainers.LoadedTrainer | None,
    run_dir: Path,
    stack: ExitStack,
    *,
    compare: bool,
) -> Generators:
    kind, count = config.rollout.rollout_engine, config.cluster.rollout_num_gpus or 1
    memory = None if loaded is None else loaded.memory()
    if kind == "external":
        addresses = config.rollout.rollout_external_engine_addrs or []
        members, launch = [Member(rank, url_of(address)) for rank, address in enumerate(addresses)], None
    else:
        members = [Member(rank, "") for rank in range(count // config.cluster.rollout_num_gpus_per_engine)]
        build = _embedded_launch if kind == "embedded" else _sglang_launch
        launch = build(config, len(members), memory, run_dir)
    router_url = _router_url(config, args)
    fleet = Fleet(
        members,
        watching(config),
        launch=launch,
        delivery=None if memory is None else _delivery(config, run_dir, stack),
        router_url=router_url,
        start_router=None if config.engine.sglang_router_ip is not None else _router_launch(config, args, run_dir),
        check_first_update=config.debug.check_weight_update_equal and compare and memory is not None,
    )
    stack.callback(fleet.close)
    fleet.start()
    return Generators(None if memory is None else fleet, _client(fleet, config), seeds_each_sample=kind == "embedded")


def _delivery(config: RunConfig, run_dir: Path, stack: ExitStack) -> Delivery:
    """How engines in other processes get weights (`--update-weight-transport`)."""
    rollout, ranks = config.rollout, config.cluster.rollout_num_gpus_per_engine
    if rollout.rollout_engine == "embedded":
        return SharedMemoryDelivery()
    way, elsewhere = rollout.update_weight_transport, rollout.rollout_engine == "external"
    if way == "auto":
        way = "disk" if elsewhere else "tensor"
    if way == "tensor":
        return TensorDelivery(rollout.update_weight_buffer_size, ranks=ranks)
    if way == "disk":
        root = run_dir / "engines" / "weights"
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        return DiskDelivery(root, Path(str(config.rollout.hf_checkpoint)), rollout.update_weight_buffer_size)
    backend = config.cluster.distributed_backend
    delivery = DistributedDelivery(
        rollout.update_weight_buffer_size,
        ranks=ranks,
        host=get_host_info()[1] if elsewhere else LOOPBACK,
        backend=backend,
        device="cuda" if backend == "nccl" else "cpu",
    )
    stack.callback(delivery.close)
    return delivery


def _embedded_launch(
    config: RunConfig, count: int, memory: Memory | None, run_dir: Path
) -> Callable[[int, str], ServerProcess]:
    engine = config.engine
    options: dict[str, object] = {
        "--model": config.rollout.hf_checkpoint,
        "--host": LOOPBACK,
        "--seed": config.run.seed,
        "--max-running-requests": engine.sglang_max_running_requests or DEFAULT_RUNNING_REQUESTS,
        "--max-total-tokens": engine.sglang_max_total_tokens,
        "--context-length": engine.sglang_context_length,
    }
    fds: list[int] = []
    if memory is not None:
        fds = [memory.fd]
        options |= {"--weights-fd": memory.fd, "--weights-layout": memory.write_layout(run_dir / "engines")}
    fixed = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    environment = child_environment(torch.get_num_threads() // count)

    def launch(rank: int, version: str) -> ServerProcess:
        port = free_port()
        own = ["--port", str(port), *(["--weight-version", version] if memory is not None else [])]
        return ServerProcess(
            f"engine {rank}",
            [sys.executable, "-P", "-m", "miles", "serve", *fixed, *own],
            f"http://{LOOPBACK}:{port}",
            run_dir / "engines" / f"engine_{rank}.log",
            environment,
            fds,
        )

    return launch


def _sglang_launch(
    config: RunConfig, count: int, memory: Memory | None, run_dir: Path
) -> Callable[[int, str], ServerProcess]:
    """SGLang loads the folder of --hf-checkpoint; the run's weights reach it by the first update."""
    python, gpus = sglang.find_python(config.engine.sglang_python), torch.cuda.device_count()

    def launch(rank: int, version: str) -> ServerProcess:
        port = free_port()
        threads = torch.get_num_threads() // count
        command = sglang.server_command(
            config, python=python, rank=rank, host=LOOPBACK, port=port, gpus=gpus, threads=threads
        )
        log = run_dir / "engines" / f"engine_{rank}.log"
        return ServerProcess(f"engine {rank}", command.argv, f"http://{LOOPBACK}:{port}", log, command.env)

    return launch


# ---- the router ----------------------------------------------------------------------------------------------------


def _router_url(config: RunConfig, args: Namespace) -> str:
    """Where requests are sent, here and by plug-ins: a port of this machine, or a router that runs already."""
    host = config.engine.sglang_router_ip
    if host is None:
        port = config.engine.sglang_router_port
        if port is not None:
            serve.check_free(port)
        args.sglang_router_ip, args.sglang_router_port = LOOPBACK, port or free_port()
    else:
        args.sglang_router_ip = f"[{host}]" if ":" in host and not host.startswith("[") else host
        args.sglang_router_port = config.engine.sglang_router_port
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}"


def _router_launch(config: RunConfig, args: Namespace, run_dir: Path) -> Callable[[], ServerProcess]:
    """The router gets `args` as they are now, like the published one."""
    given = pickle.dumps(portable(args))
    port = args.sglang_router_port

    def launch() -> ServerProcess:
        fd = anonymous_file()
        try:
            os.write(fd, given)
            os.lseek(fd, 0, os.SEEK_SET)
            return ServerProcess(
                "the router",
                [sys.executable, "-P", "-m", "miles", "route", "--host", LOOPBACK, "--port", str(port)]
                + ["--args-fd", str(fd)],
                f"http://{LOOPBACK}:{port}",
                run_dir / "engines" / "router.log",
                child_environment(1),
                [fd],
            )
        finally:
            os.close(fd)

    return launch
