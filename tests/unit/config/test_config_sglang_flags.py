"""`--sglang-<flag>` where SGLang's servers are started: taken, converted and refused as SGLang would."""

from __future__ import annotations

import subprocess
import sys

import pytest
from config_helpers import refusal, settings

from miles.config import resolve as rules
from miles.config import sglang_flags

SGLANG = ("--rollout-engine", "sglang")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "local_gpus", lambda: 0)


def test_the_table_finds_flags_by_every_spelling() -> None:
    version, flags = sglang_flags.table()
    assert version == "0.5.23" and len({flag.option for flag in flags.values()}) == 531
    assert sglang_flags.find("sglang_tensor_parallel_size") is sglang_flags.find("sglang_tp_size")
    assert sglang_flags.find("sglang_cuda_graph_max_bs").option == "cuda-graph-max-bs-decode"


WRONG = [
    (["--sglang-page-sice", "16"], "SGLang 0.5.23 has no such flag. Did you mean --sglang-page-size?"),
    (["--sglang-page-size", "many"], "--sglang-page-size: expected a whole number, got 'many'."),
    (["--sglang-page-size"], "--sglang-page-size: expected a whole number, got True."),
    (["--sglang-page-size", "1", "2"], "--sglang-page-size: expected a whole number, got [1, 2]."),
    (["--sglang-log-requests", "3"], "expected no value (it is a switch), got 3."),
    (["--sglang-schedule-conservativeness", "high"], "expected a number, got 'high'."),
    (["--sglang-log-requests-format", "xml"], "expected one of json, text, got 'xml'."),
    (["--sglang-attention-backend", "fast"], "--sglang-attention-backend: expected one of "),
    (["--sglang-preferred-sampling-params", "{"], "expected a JSON object, got '{'."),
    (["--sglang-host", "0.0.0.0"], "miles sets this itself."),
    (["--sglang-dp-size", "2"], "needs --sglang-enable-dp-attention."),
    (["--sglang-pp-size", "2"], "expected a divisor of --rollout-num-gpus-per-engine 1, got 2."),
]


@pytest.mark.parametrize(("flags", "sentence"), WRONG)
def test_what_sglang_would_refuse_is_refused_first(flags: list[str], sentence: str) -> None:
    assert sentence in refusal(*SGLANG, *flags)


TAKEN = [
    (["--sglang-page-size", "16"], ["--page-size", "16"]),
    (["--sglang-log-requests"], ["--log-requests"]),
    (["--sglang-lora-target-modules", "q_proj", "v_proj"], ["--lora-target-modules", "q_proj", "v_proj"]),
    (["--sglang-max-prefill-tokens", "4Ki"], ["--max-prefill-tokens", "4Ki"]),
    (["--sglang-no-lora-strict-loading"], ["--no-lora-strict-loading"]),
    (["--sglang-moe-a2a-backend", "none"], ["--moe-a2a-backend", "none"]),
]


@pytest.mark.parametrize(("flags", "words"), TAKEN)
def test_what_is_taken_becomes_the_servers_own_flag(flags: list[str], words: list[str]) -> None:
    config = settings(*SGLANG, *flags)
    [name] = config.passed
    assert sglang_flags.argv(name, config.extras[name]) == words


def test_a_flag_that_only_a_newer_sglang_may_have_is_passed_with_a_notice() -> None:
    config = settings(*SGLANG, "--sglang-zzz-quux", "3")
    assert "--sglang-zzz-quux: SGLang 0.5.23 has no such flag; passed on as it is." in config.notices


def test_flags_of_the_server_are_effective_with_it_alone() -> None:
    flags = ("--sglang-mem-fraction-static", "0.7", "--sglang-attention-backend", "triton")
    assert not [n for n in settings(*SGLANG, *flags).notices if "sglang" in n]
    here = [n for n in settings(*flags).notices if "no such setting" in n]
    assert len(here) == 2
    external = ("--rollout-external", "--rollout-external-engine-addrs", "a:1")
    assert len([n for n in settings(*external, *flags).notices if "external engines are started" in n]) == 2
    assert "is not built yet" in refusal("--sglang-quantization", "fp8")
    assert settings(*SGLANG, "--sglang-quantization", "fp8").engine.sglang_quantization == "fp8"


def test_help_does_not_read_the_table() -> None:
    code = (
        "import sys; from miles.config import sglang_flags; from miles.config.parse import parse\n"
        "try: parse(['--help'])\nexcept SystemExit: pass\n"
        "assert sglang_flags.table.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
