"""Plug-ins written for TRL, verl and slime load unmodified, and `miles check` says what stands in between."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from published_runs import BASE, ROOT, logged, train

from miles.__main__ import main
from miles.config import parse
from miles.errors import UsageError
from miles.hooks import bind
from miles.hooks.foreign import adapter_of
from miles.observe.record import read_rollouts
from miles.types import Sample

PARSED = (
    "--prompt-data", "x.jsonl", "--rm-type", "math", "--rollout-batch-size", "4", "--num-rollout", "1",
    "--num-steps-per-rollout", "1", "--train-backend", "megatron",
)  # fmt: skip
ARGS = {"reward_key": None, "label_key": None}


def score(path: str, samples: list[Sample], **args: Any) -> list[Any]:
    given = Namespace(**{**ARGS, "custom_rm_path": path, **args})
    hook = bind(given).custom_rm
    assert hook is not None
    return asyncio.run(hook.call_batch_async(given, samples))


def samples(*, chat: bool = False, **metadata: Any) -> list[Sample]:
    prompt: Any = [{"role": "user", "content": "1+1=?"}] if chat else "1+1=?"
    return [
        Sample(index=i, group_index=0, prompt=prompt, response=text, label=label, tokens=[1, 2, 3, 4, 5],
               response_length=i + 1, metadata=dict(metadata))
        for i, (text, label) in enumerate([("it is 2", "2"), ("12a", "7")])
    ]  # fmt: skip


# ---- TRL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chat", "args", "metadata", "expected"),
    [
        ("accuracy_reward", True, {}, {}, [1.0, 0.0]),
        ("format_reward", False, {}, {}, [1 / 7, 2 / 3]),
        ("length_reward", False, {}, {}, [-1.0, -2.0]),
        ("column_reward", False, {"label_key": "solution"}, {"difficulty": 3}, [5.0, 10.0]),
    ],
)
def test_trl(name: str, chat: bool, args: dict[str, Any], metadata: dict[str, Any], expected: list[float]) -> None:
    assert score(f"trl_rewards.{name}", samples(chat=chat, **metadata), **args) == pytest.approx(expected)


def test_trl_in_a_run(tmp_path: Path) -> None:
    run = train(tmp_path, "--custom-rm-path", "trl_rewards.format_reward", "--group-rm")
    assert len({s.reward for s in read_rollouts(run, 1)}) > 1
    calls = importlib.import_module("trl_rewards").CALLS
    assert len(calls) == 8 and {"label", "prompts", "completion_ids"} <= set(calls[0])


def test_trl_on_conversations_that_a_template_renders(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "quickstart" / "base", tmp_path / "model")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    rows = [{"chat": [{"role": "user", "content": f"{100 + i}+200=?"}], "solution": "3"} for i in range(8)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(
        tmp_path, "--custom-rm-path", "trl_rewards.accuracy_reward", "--num-rollout", "1",
        "--hf-checkpoint", str(tmp_path / "model"), "--prompt-data", str(tmp_path / "chat.jsonl"),
        "--input-key", "chat", "--label-key", "solution", "--apply-chat-template",
    )  # fmt: skip
    recorded = read_rollouts(run, 0)
    assert all(s.prompt.endswith("+200=?") for s in recorded)
    assert [s.reward for s in recorded] == [float("3" in s.response) for s in recorded]


# ---- verl ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("compute_score", [1.0, 0.0]),
        ("compute_score_without_extra", [2.0, 1.0]),
        ("compute_score_with_settings", [1.0, 1.0]),
    ],
)
def test_verl(name: str, expected: list[float]) -> None:
    given = samples(data_source="carry", extra_info={"split": "train"})
    assert score(f"verl_score.{name}", given) == pytest.approx(expected)


def test_a_verl_dict_is_kept_whole_where_a_key_is_named() -> None:
    first, _ = score("verl_score.compute_score", samples(extra_info={"split": "test"}), reward_key="score")
    assert first == {"score": 1.0, "acc": True, "split": "test"}


def test_verl_file_in_a_run(tmp_path: Path) -> None:
    file = Path(__file__).parent / "plug_ins" / "verl_score.py"
    run = train(tmp_path, "--custom-rm-path", f"{file}:compute_score")
    rewards = [s.reward for s in read_rollouts(run, 0)]
    assert all(isinstance(reward, float) for reward in rewards) and len(set(rewards)) > 1


# ---- slime ---------------------------------------------------------------------------------------------------------


def test_slime_loss_and_three_argument_post_processing(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        "--custom-generate-function-path", "slime_plug_ins.generate", "--rm-type", "random",
        "--rollout-data-postprocess-path", "slime_plug_ins.rollout_data_postprocess",
        "--loss-type", "custom_loss", "--custom-loss-function-path", "slime_plug_ins.custom_loss",
    )  # fmt: skip
    module = importlib.import_module("slime_plug_ins")
    assert module.POSTPROCESSED == [0, 1]
    assert module.MASKED and all(module.MASKED)
    assert len(logged(run, "train/entropy")) == 2
    # One module under two names, not two modules.
    assert module.Sample is Sample and sys.modules["slime.utils.types"] is sys.modules["miles.utils.types"]


def test_slime_loss_that_adds_to_the_built_in_one(tmp_path: Path) -> None:
    run = train(
        tmp_path, "--loss-type", "custom_loss", "--custom-loss-function-path", "slime_plug_ins.custom_policy_loss",
        "--rm-type", "random", "--num-rollout", "1",
    )  # fmt: skip
    assert logged(run, "train/pg_loss") and logged(run, "train/grad_norm")[0] > 0
    assert logged(run, "train/mean_advantage") == pytest.approx(logged(run, "rollout/advantages"), abs=1e-6)


@pytest.mark.parametrize(("name", "metric"), [("custom_tis", "ratio"), ("strict_tis", "strict")])
def test_slime_importance_functions(tmp_path: Path, name: str, metric: str) -> None:
    run = train(
        tmp_path, "--use-tis", "--custom-tis-function-path", f"slime_plug_ins.{name}", "--rm-type", "random",
        "--num-rollout", "1",
    )  # fmt: skip
    assert logged(run, f"train/{metric}") == [pytest.approx(1.0, abs=0.01)]


def test_what_miles_does_not_have_is_missing_under_its_own_name() -> None:
    importlib.import_module("slime_plug_ins")
    with pytest.raises(ModuleNotFoundError, match=r"slime\.utils\.nothing.*miles has no miles\.utils\.nothing"):
        importlib.import_module("slime.utils.nothing")


def test_an_installed_slime_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "slime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("mine = True\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in sys.modules if name.split(".")[0] == "slime"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    assert importlib.import_module("slime").mine
    assert adapter_of(importlib.import_module("trl_rewards").format_reward) is None
    monkeypatch.delitem(sys.modules, "slime")


# ---- Megatron-LM ---------------------------------------------------------------------------------------------------

PROVIDER = ("--custom-model-provider-path", "megatron_provider.model_provider")


def test_a_provider_that_imports_megatron_training_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("megatron.core")
    flags = ("--rm-type", "random", "--num-rollout", "1", "--train-backend", "megatron")
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    own = train(tmp_path / "with", *flags, *PROVIDER)
    assert "building GPT model ..." in (own / "ranks" / "rank_0.log").read_text()
    built_in = train(tmp_path / "without", *flags)
    for key in ("train/loss", "train/entropy_loss", "train/grad_norm"):
        assert logged(own, key) == pytest.approx(logged(built_in, key), rel=1e-4, abs=1e-6)
    capsys.readouterr()
    assert main(["hooks", *PROVIDER]) == 0
    assert " published (imports of megatron.training answered by miles)" in capsys.readouterr().out


def test_arguments_are_those_of_a_trainer() -> None:
    pytest.importorskip("megatron.core")
    from miles.trainer.megatron.provided import get_args

    with pytest.raises(UsageError, match="this process trains no Megatron model"):
        get_args()


def test_an_installed_megatron_lm_wins_and_is_told_the_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("megatron.core")
    from miles.trainer.megatron import provided

    package = tmp_path / "site" / "megatron" / "training"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("mine = True\n")
    (package / "global_vars.py").write_text("GIVEN = []\nset_args = GIVEN.append\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in sys.modules if name.startswith("megatron.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["megatron"], "training", raising=False)
    importlib.invalidate_caches()
    assert importlib.import_module("megatron.training").mine
    monkeypatch.setattr(provided, "_run", None)
    config, args = parse(["--hf-checkpoint", str(ROOT / "examples/quickstart/base"), *PARSED])
    provided.announce(config, args)
    assert [args] == importlib.import_module("megatron.training.global_vars").GIVEN and provided.get_args() is args
    for name in [name for name in sys.modules if name.startswith("megatron.training")]:
        monkeypatch.delitem(sys.modules, name)


# ---- what the user is told -----------------------------------------------------------------------------------------


def test_check_names_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.yaml").write_text(BASE)

    def forms(*flags: str) -> str:
        with contextlib.chdir(ROOT):
            assert main(["hooks", *flags]) == 0
        return capsys.readouterr().out

    assert " trl (in a thread)" in forms("--custom-rm-path", "trl_rewards.format_reward")
    assert " verl (in a thread)" in forms("--custom-rm-path", "verl_score.compute_score")
    told = forms("--custom-generate-function-path", "slime_plug_ins.generate")
    assert "(imports of slime answered by miles)" in told
    assert "answered by miles" not in forms("--custom-generate-function-path", "search_generate.generate")


def test_the_record_of_a_verl_run_is_json(tmp_path: Path) -> None:
    run = train(tmp_path, "--custom-rm-path", "verl_score.compute_score", "--reward-key", "score", "--num-rollout", "1")
    assert {s.reward["acc"] for s in read_rollouts(run, 0)} <= {True, False}
    assert json.loads((run / "summary.json").read_text())["rollouts"] == 1
