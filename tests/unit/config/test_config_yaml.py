"""--config and --custom-config-path: the same flags, written as YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_helpers import REQUIRED, value_of, write

from miles.config import parse
from miles.config.flags import Flag
from miles.config.sections import FLAGS
from miles.errors import DataError, UsageError

RUN = """\
hf-checkpoint: models/base
prompt_data: train.jsonl
--num-rollout: 3
rollout-batch-size: 16
n-samples-per-prompt: 8
global-batch-size: 64
"""

KEYS_AND_VALUES = [
    ("lr: 1.5e-4", "lr", 1.5e-4),
    ("lr: 1e-6", "lr", 1e-6),  # text for YAML 1.1, a number for the flag
    ("--lr: 0.5", "lr", 0.5),
    ("rollout_stop: END", "rollout_stop", ["END"]),
    ("rollout-stop: [END, '\\n', \"\\n\"]", "rollout_stop", ["END", "\\n", "\n"]),
    ("rollout-stop-token-ids:\n  - 1\n  - 2", "rollout_stop_token_ids", [1, 2]),
    ("group-rm: true", "group_rm", True),
    ("group-rm: false", "group_rm", False),
    ("disable-rewards-normalization: true", "rewards_normalization", False),
    ("disable-rewards-normalization: false", "rewards_normalization", True),
    ("rewards-normalization: false", "rewards_normalization", False),
    ("offload-train: false", "offload_train", False),
    ("no-offload-train: true", "offload_train", False),
    ("apply-chat-template-kwargs:\n  enable_thinking: false", "apply_chat_template_kwargs", {"enable_thinking": False}),
    ("apply-chat-template-kwargs: '{\"a\": 1}'", "apply_chat_template_kwargs", {"a": 1}),
    (
        "hook-policy: {custom-rm: drop, buffer-filter: raise}",
        "hook_policy",
        {"custom-rm": "drop", "buffer-filter": "raise"},
    ),
    ("hook-policy: [custom-rm=drop]", "hook_policy", {"custom-rm": "drop"}),
    ("wandb-group: 007", "wandb_group", "007"),
    ("label-key: yes", "label_key", "yes"),
    ("label-key: null", "label_key", None),
    ("seed:", "seed", 1234),
    ("sglang-dp-size: 1", "sglang_data_parallel_size", 1),
    ("sampling:\n  rollout-top-p: 0.5\n  lr: 2", "rollout_top_p", 0.5),
    ("optimizer:\n  lr: 2", "lr", 2.0),  # a heading, although there is a flag of that name
    ("optimizer: adam", "optimizer", "adam"),
]


@pytest.mark.parametrize(("text", "name", "expected"), KEYS_AND_VALUES, ids=[k[0] for k in KEYS_AND_VALUES])
def test_keys_and_values(tmp_path: Path, text: str, name: str, expected: object) -> None:
    config, args = parse(["--config", write(tmp_path, f"{RUN}{text}\n")])
    assert value_of(config, name) == expected
    assert name == "offload" or getattr(args, name) == expected


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, RUN + "lr: 2\nseed: 7\n")
    config, _ = parse(["--lr", "3", "--config", path])
    assert (config.optimizer.lr, config.run.seed, config.rollout.rollout_seed) == (3.0, 7, 42)
    origins = [config.origins[name] for name in ("lr", "seed", "rollout_seed")]
    assert origins == ["command line", "file", "default"]


def test_a_flag_given_in_the_file_is_explicit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--fp16: Training in fp16 is not built yet"):
        parse(["--config", write(tmp_path, RUN + "fp16: true\n")])
    config, _ = parse(["--config", write(tmp_path, RUN + "colocate: true\n")])
    assert any(n.startswith("--colocate: no meaning here") for n in config.notices)


MISTAKES = [
    ("lrr: 1", "run.yaml:7: --lrr: no such flag. Did you mean --lr?"),
    (
        "\n# comment\nrolout-batch-size: 1",
        "run.yaml:9: --rolout-batch-size: no such flag. Did you mean --rollout-batch-size",
    ),
    ("section:\n  seeed: 1", "run.yaml:8: --seeed: no such flag. Did you mean --seed"),
    ("lr: fast", "run.yaml:7: --lr: expected a number, got 'fast'."),
    ("lr: [1, 2]", "run.yaml:7: --lr: expected one value, got [1, 2]."),
    ("rollout-stop: [[a], b]", "run.yaml:7: --rollout-stop: expected one value"),
    ("group-rm: 1", "run.yaml:7: --group-rm: expected true or false, got 1."),
    ("loss-type: ppo", "run.yaml:7: --loss-type: expected one of policy_loss"),
    ("lr: 1\nlr: 2", "run.yaml:8: --lr: given before, at run.yaml:7."),
    ("lr: 1\nmore:\n  --lr: 2", "run.yaml:9: --lr: given before, at run.yaml:7."),
    ("config: other.yaml", "run.yaml:7: --config: a file of flags cannot name another one."),
    ("lr: [", "run.yaml:8: not valid YAML"),
    ("- lr", "run.yaml:7: not valid YAML"),
    ("lr: 1\nseed: !!python/object:os.system x", "run.yaml:8: not valid YAML"),
    ("seed: 2024-13-41", "not valid YAML: month must be in 1..12"),
    ("lr: .nan", "run.yaml:7: --lr: expected a number, got '.nan'."),
    ("sglang-tp-size: 2", "miles sets this itself. Use --rollout-num-gpus-per-engine."),
]


@pytest.mark.parametrize(("text", "sentence"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(["--config", write(tmp_path, f"{RUN}{text}\n")])
    assert sentence in str(caught.value)


def test_files_that_are_no_mapping_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run.yaml:1: expected a mapping"):
        parse(["--config", write(tmp_path, "- lr\n- seed\n")])
    with pytest.raises(UsageError, match=r"--config: expected a readable YAML file, got 'none.yaml'"):
        parse(["--config", "none.yaml"])
    parse([*REQUIRED, "--config", write(tmp_path, "")])


def test_undeclared_server_flags(tmp_path: Path) -> None:
    config, args = parse(["--config", write(tmp_path, RUN + "sglang-page-size: 16\nrouter-policy: random\n")])
    assert (args.sglang_page_size, args.router_policy) == (16, "random")
    assert config.extras == {"sglang_page_size": 16, "router_policy": "random"}
    assert any(n.startswith("--router-policy") for n in config.notices)


SAMPLE_VALUES = {"int": "1", "float": "1", "str": "text", "json": '{"a": 1}', "pairs": "a=b", "pattern": "2"}


@pytest.mark.parametrize(
    "flag",
    [f for f in FLAGS.values() if f.status.kind == "effective" and f.name not in ("config", "custom_config_path")],
    ids=lambda f: f.name,
)
def test_each_effective_flag_says_the_same_in_both_places(flag: Flag, tmp_path: Path) -> None:
    text = flag.choices[-1] if flag.choices else SAMPLE_VALUES.get(flag.kind, "")
    text = {"optimizer": "adam", "eps_clip_c": "2", "rollout_max_context_len": "9"}.get(flag.name, text)
    if "path with" in (flag.check.expected if flag.check else ""):
        text = "x/{rollout_id}"
    line, given = ([flag.option], "true") if flag.is_switch else ([flag.option, text], f"'{text}'")
    outcome = []
    for argv in (line, ["--config", write(tmp_path, f"{flag.option[2:]}: {given}\n")]):
        try:
            config, _ = parse(
                [*base_without(flag), "--run-dir", "r", *argv] if flag.name != "run_dir" else [*REQUIRED, *argv]
            )
            assert config.origins[flag.name] != "default"
            outcome.append((config, ""))
        except UsageError as error:  # needs another flag, in both places
            outcome.append((None, str(error)))
    assert outcome[0] == outcome[1]


def base_without(flag: Flag) -> list[str]:
    if flag.option not in REQUIRED:
        return list(REQUIRED)
    at = REQUIRED.index(flag.option)
    return [*REQUIRED[:at], *REQUIRED[at + 2 :]]


# ---- --custom-config-path ------------------------------------------------------------------------------------------


def test_custom_config_adds_attributes_and_overrides_flags(tmp_path: Path) -> None:
    text = "max_turns: 3\nnothing: null\nrollout_interaction:\n  path: a.b\nlr: 5e-5\nseed: null\n"
    text += "rewards_normalization: false\nn_samples_per_prompt: 4\n"
    config, args = parse([*REQUIRED, "--lr", "1", "--custom-config-path", write(tmp_path, text, "custom.yaml")])
    assert args.nothing is None and config.run.seed == 1234  # null is a value for plug-ins, and no value for a flag
    assert args.max_turns == 3 and args.rollout_interaction == {"path": "a.b"}
    assert config.optimizer.lr == args.lr == 5e-5
    assert config.algorithm.rewards_normalization is False
    assert config.data.samples_per_rollout == 64  # what follows from flags follows from these, too
    assert config.origins["lr"] == config.origins["max_turns"] == "custom config"


def test_custom_config_of_flags_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"custom.yaml:2: --lr: expected a number, got 'fast'"):
        parse([*REQUIRED, "--custom-config-path", write(tmp_path, "a: 1\nlr: fast\n", "custom.yaml")])
    with pytest.raises(UsageError, match="--fp16"):
        parse([*REQUIRED, "--custom-config-path", write(tmp_path, "fp16: true\n", "custom.yaml")])
