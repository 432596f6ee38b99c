"""The command line: values, unknown flags, missing flags, pass-through families."""

from __future__ import annotations

import pytest
from config_helpers import REQUIRED, namespace, refusal, settings, value_of

from miles.config import parse, parse_args
from miles.config.passthrough import split
from miles.errors import FlagError

VALUES = [
    (["--lr", "1.5e-4"], "lr", 1.5e-4),
    (["--lr=1.5e-4"], "lr", 1.5e-4),
    (["--rollout-top-k", "-1"], "rollout_top_k", -1),
    (["--rollout-stop", "END", "\n"], "rollout_stop", ["END", "\n"]),
    (["--rollout-stop-token-ids", "1", "2"], "rollout_stop_token_ids", [1, 2]),
    (
        ["--apply-chat-template-kwargs", '{"enable_thinking": false}'],
        "apply_chat_template_kwargs",
        {"enable_thinking": False},
    ),
    (["--disable-rewards-normalization"], "rewards_normalization", False),
    (["--disable-rollout-trim-samples"], "disable_rollout_trim_samples", True),
    (["--offload-train"], "offload_train", True),
    (["--no-offload-train"], "offload_train", False),
    (["--group-rm"], "group_rm", True),
    (["--loss-type", "sft_loss"], "loss_type", "sft_loss"),
    (["--sglang-dp-size", "1"], "sglang_data_parallel_size", 1),
    (["--custom-rm-path", "my.rewards.grade"], "custom_rm_path", "my.rewards.grade"),
    (
        ["--hook-policy", "custom-rm=drop", "buffer-filter=raise", "--hook-policy", "custom-generate=retry:2"],
        "hook_policy",
        {"custom-rm": "drop", "buffer-filter": "raise", "custom-generate": "retry:2"},
    ),
    (["--lr", "1", "--lr", "2"], "lr", 2.0),
]


@pytest.mark.parametrize(("flags", "name", "expected"), VALUES, ids=[" ".join(v[0])[:40] for v in VALUES])
def test_values(flags: list[str], name: str, expected: object) -> None:
    assert value_of(settings(*flags), name) == expected


REFUSALS = [
    (["--lr", "fast"], "--lr: expected a number, got 'fast'."),
    (["--num-rollout", "1.5"], "--num-rollout: expected a whole number, got '1.5'."),
    (["--lr"], "--lr: expected one argument."),
    (["--loss-type", "ppo"], "--loss-type: expected one of policy_loss, sft_loss, custom_loss, got 'ppo'."),
    (["--n-samples-per-prompt", "0"], "--n-samples-per-prompt: expected a value >= 1, got 0."),
    (["--rollout-top-p", "0"], "--rollout-top-p: expected a value > 0 and <= 1, got 0.0."),
    (["--rollout-top-k", "0"], "--rollout-top-k: expected a value >= 1, or -1 for no limit, got 0."),
    (["--eps-clip-c", "1"], "--eps-clip-c: expected a value > 1, got 1.0."),
    (["--sglang-router-port", "70000"], "--sglang-router-port: expected a port from 1 to 65535, got 70000."),
    (["--apply-chat-template-kwargs", "{"], "--apply-chat-template-kwargs: expected JSON, got '{'."),
    (["--apply-chat-template-kwargs", "[1]"], "--apply-chat-template-kwargs: expected a JSON object"),
    (["--hook-policy", "drop"], "--hook-policy: expected NAME=VALUE, got 'drop'."),
    (
        ["--save-debug-rollout-data", "x.pt"],
        "--save-debug-rollout-data: expected a path with {rollout_id} in it, and no other braces, got 'x.pt'.",
    ),
    (["--optimizer", "sgd"], "--optimizer: expected adam (which is AdamW), got 'sgd'."),
    (["--use-tis", "true"], "command line: 'true' belongs to no flag."),
    (["--num-steps-per-rollout", "0"], "--num-steps-per-rollout: expected a value >= 1, got 0."),
    (["--lr=--"], "command line: '--lr=--' has no meaning here."),
    (["--rollout-batchsize", "2"], "--rollout-batchsize: no such flag. Did you mean --rollout-batch-size"),
    (["--n_samples_per_prompt", "2"], "--n_samples_per_prompt: no such flag. Did you mean --n-samples-per-prompt"),
    (["--batch-size", "2"], "--batch-size: no such flag. Did you mean --micro-batch-size"),
    (["--group"], "--group: no such flag."),
    (["--moe-layer-freq", "[0]*3+"], "--moe-layer-freq: expected a whole number, or one per layer such as"),
    (["--sglang-tp-size", "2"], "--sglang-tp-size: miles sets this itself. Use --rollout-num-gpus-per-engine."),
]


@pytest.mark.parametrize(("flags", "sentence"), REFUSALS, ids=[" ".join(r[0]) for r in REFUSALS])
def test_refusals(flags: list[str], sentence: str) -> None:
    assert sentence in refusal(*flags)


def test_all_unknown_flags_are_named_at_once() -> None:
    text = refusal("--lrr", "1", "--grop-rm")
    assert "--lrr: no such flag. Did you mean --lr?" in text
    assert "--grop-rm: no such flag. Did you mean --group-rm?" in text


def test_all_missing_flags_are_named_at_once() -> None:
    with pytest.raises(FlagError) as caught:
        parse([])
    for option in ("--hf-checkpoint", "--rollout-batch-size", "--num-rollout", "--global-batch-size", "--prompt-data"):
        assert option in str(caught.value)


@pytest.mark.parametrize(
    ("left_out", "instead"),
    [
        ("--num-rollout", ["--num-epoch", "2"]),
        ("--global-batch-size", ["--num-steps-per-rollout", "2"]),
        ("--global-batch-size", ["--use-dynamic-global-batch-size"]),
        ("--global-batch-size", ["--debug-rollout-only"]),
        ("--prompt-data", ["--disable-rollout-global-dataset", "--rollout-function-path", "my.rollout.fn"]),
        ("--prompt-data", ["--data-source-path", "my.data.Source"]),
    ],
)
def test_required_flags_with_an_alternative(left_out: str, instead: list[str]) -> None:
    at = REQUIRED.index(left_out)
    rest = REQUIRED[:at] + REQUIRED[at + 2 :]
    with pytest.raises(FlagError, match=left_out):
        parse(rest)
    parse([*rest, *instead])


def test_the_built_in_rollout_needs_the_data_set() -> None:
    with pytest.raises(FlagError, match="--disable-rollout-global-dataset: needs a rollout function of your own"):
        parse([*REQUIRED, "--disable-rollout-global-dataset"])


def test_pass_through_takes_everything_up_to_the_next_flag() -> None:
    argv = ["--lr", "1", "--sglang-foo", "3", "--router-policy", "cache_aware", "--sglang-on"]
    argv += ["--sglang-many", "a", "-2", "--sglang-eq=0.5", "--seed", "1"]
    rest, passed = split(argv, {"--lr", "--seed"})
    assert rest == ["--lr", "1", "--seed", "1"]
    assert passed == {
        "sglang_foo": 3,
        "router_policy": "cache_aware",
        "sglang_on": True,
        "sglang_many": ["a", -2],
        "sglang_eq": 0.5,
    }


def test_undeclared_server_flags_land_on_args_with_a_notice() -> None:
    config, args = parse([*REQUIRED, "--sglang-page-size", "16", "--sglang-mem-fraction-statik", "0.5"])
    assert args.sglang_page_size == 16
    of_servers = "--sglang-page-size: no meaning here, it belongs to SGLang's servers"
    assert any(n.startswith(of_servers) for n in config.notices)
    assert any("Did you mean --sglang-mem-fraction-static?" in n for n in config.notices)


def test_parse_args_reads_the_process_and_takes_custom_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *REQUIRED, "--max-turns", "4"])
    args = parse_args(lambda parser: parser.add_argument("--max-turns", type=int, default=1) and parser)
    assert args.max_turns == 4 and args.rollout_batch_size == 16

    monkeypatch.setattr("sys.argv", ["train.py", *REQUIRED])
    with pytest.raises(FlagError, match="--lr: add_custom_arguments adds this flag, but it is one of miles"):
        parse_args(lambda parser: parser.add_argument("--lr"))


def test_published_import_path() -> None:
    from miles.utils import arguments

    assert arguments.parse_args is parse_args


def test_old_environment_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_BACKEND", "fsdp")
    assert "--train-backend" in refusal()


def test_switch_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", "yes")
    assert refusal() == "MILES_EXPERIMENTAL_ROLLOUT_REFACTOR: expected a whole number, got 'yes'."


def test_namespace_has_plain_values() -> None:
    args = namespace("--rollout-stop", "END")
    assert args.rollout_stop == ["END"] and args.lr == 1e-6 and args.miles_router_middleware_paths == ""


@pytest.mark.parametrize(
    ("template", "allowed"),
    [
        ("x/{rollout_id}.pt", True),
        ("x/{rollout_id:>4}_{run_dir}.pt", True),
        ("x/{rollout_id:05d}.pt", False),  # evaluations fill in text
        ("x.pt", False),
        ("x/{rollout_id}_{step}.pt", False),
        ("x/{rollout_id}_{}.pt", False),
        ("x/{rollout_id", False),
        ("x/{{rollout_id}}.pt", False),
    ],
)
def test_templates_are_filled_before_they_are_needed(template: str, allowed: bool) -> None:
    if allowed:
        settings("--save-debug-rollout-data", template)
    else:
        assert "expected a path with {rollout_id} in it" in refusal("--save-debug-rollout-data", template)


def test_long_values_are_cut_in_messages() -> None:
    assert len(refusal("--lr", "x" * 10_000)) < 300


def test_home_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = settings("--run-dir=~/runs/x", "--save={run_dir}/ck", "--load=~/old")
    assert (config.run.run_dir, config.checkpoint.save) == ("/home/me/runs/x", "/home/me/runs/x/ck")
    assert config.checkpoint.load == "/home/me/old"
