"""On-policy distillation: a teacher behind HTTP, and a student that comes closer to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from miles.engine.calls import unregister_local_engine
from miles.engine.embedded.engine import EmbeddedEngine
from miles.hooks import load_function
from miles.loss.advantages import AdvantageInputs, compute_advantages
from miles.observe.record import read_rollouts
from miles.run.serve import on_loopback

CONFIG = "examples/on_policy_distillation/distill.yaml"
BASE = Path(__file__).resolve().parents[2] / "examples/quickstart/base"
SMALL = ("--rollout-batch-size", 8, "--n-samples-per-prompt", 4, "--num-steps-per-rollout", 1, "--lr-warmup-iters", 0)
NO_EVAL = ("--eval-interval", 100, "--skip-eval-before-train")


@pytest.fixture(scope="module")
def teacher() -> Iterator[str]:
    """The quickstart's base model behind a socket, as `miles serve` would have it."""
    engine = EmbeddedEngine.from_folder(str(BASE))
    with on_loopback(engine, None) as (host, port):
        url = f"http://{host}:{port}"
        unregister_local_engine(url)  # no short cut: a teacher is another process
        yield url
    engine.close()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with noise on its weights."""
    folder = tmp_path_factory.mktemp("student")
    for file in BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(BASE / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.4
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_student_comes_closer_to_the_teacher(train, metrics, teacher: str, student: Path) -> None:
    flags = ("--rm-url", teacher, "--hf-checkpoint", student, "--num-rollout", 8, "--lr", "2e-4")
    run = train(CONFIG, *SMALL, *NO_EVAL, *flags)
    gaps = [-value for value in metrics(run, "rollout/advantages")]  # the reverse KL, estimated
    assert gaps[0] > 0.5
    assert np.mean(gaps[-2:]) < 0.7 * np.mean(gaps[:2])
    assert all(value < 0 for value in metrics(run, "rollout/teacher_log_probs"))
    sample = read_rollouts(run, 0)[0]
    assert len(sample.reward["teacher_log_probs"]) == sample.response_length
    assert set(metrics(run, "rollout/raw_reward")) != {0.0}


def test_a_teacher_that_is_the_student_teaches_nothing(train, metrics, teacher: str) -> None:
    run = train(CONFIG, *SMALL, *NO_EVAL, "--rm-url", teacher, "--num-rollout", 1)
    assert metrics(run, "rollout/advantages")[0] == pytest.approx(0, abs=2e-3)


PUBLISHED = '''
import httpx, torch

async def reward_func(args, sample, **kwargs):
    payload = {"input_ids": sample.tokens, "return_logprob": True, "logprob_start_len": 0,
               "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False}}
    async with httpx.AsyncClient() as client:
        return (await client.post(args.rm_url + "/generate", json=payload, timeout=60)).json()

def post_process_rewards(args, samples, **kwargs):
    rows = [torch.tensor([e[0] for e in s.reward["meta_info"]["input_token_logprobs"][1:]]) for s in samples]
    rows = [row[-s.response_length:] for row, s in zip(rows, samples)]
    for sample, row in zip(samples, rows):
        sample.teacher_log_probs = row
    return rows, rows
'''


def test_the_published_form_with_tensors_as_rewards(train, metrics, teacher: str, tmp_path: Path) -> None:
    """The whole answer is the reward, and both reward lists are tensors."""
    plug_in = tmp_path / "published.py"
    plug_in.write_text(PUBLISHED)
    text = (BASE.parents[2] / CONFIG).read_text()
    config = tmp_path / "config.yaml"
    ours = "examples/on_policy_distillation/on_policy_distillation.py"
    config.write_text(text.replace(ours, str(plug_in)).replace("reward-key: score\n", ""))
    run = train(config, *SMALL, *NO_EVAL, "--rm-url", teacher, "--num-rollout", 1)
    assert metrics(run, "rollout/advantages")[0] == pytest.approx(0, abs=2e-3)


# ---- what can be wrong ---------------------------------------------------------------------------------------------


def test_a_teacher_that_does_not_answer_ends_the_run(train, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_function("examples/on_policy_distillation/on_policy_distillation.py:reward_func").__globals__
    monkeypatch.setitem(module, "ATTEMPTS", 1)
    train(CONFIG, *SMALL, *NO_EVAL, "--rm-url", "http://127.0.0.1:9", "--num-rollout", 1, status=1)
    said = capfd.readouterr().err
    assert "http://127.0.0.1:9/generate: no answer" in said and "on_policy_distillation.py:" in said


POST_PROCESS = "--custom-reward-post-process-path"
WRONG = {
    "nothing": ("pass", "the samples have no teacher_log_probs"),
    "too_short": ("s.teacher_log_probs = [-0.1]", "expected one number for each of its"),
    "text": ("s.teacher_log_probs = ['a'] * s.response_length", "got something else"),
    "nan": ("s.teacher_log_probs = [float('nan')] * s.response_length", "is nan at response token 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_teacher_log_probs_are_named(train, teacher: str, tmp_path: Path, capfd, case: str) -> None:
    body, says = WRONG[case]
    plug_in = tmp_path / "wrong.py"
    plug_in.write_text(
        f"def post(args, samples):\n    for s in samples:\n        {body}\n"
        "    return [0.0] * len(samples), [0.0] * len(samples)\n"
    )
    flags = ("--rm-url", teacher, POST_PROCESS, f"{plug_in}:post", "--num-rollout", 1)
    train(CONFIG, *SMALL, *NO_EVAL, *flags, status=1)
    assert says in capfd.readouterr().err


def test_the_estimator() -> None:
    inputs = AdvantageInputs(
        None, [2, 1], old_log_probs=torch.tensor([-1.0, -2.0, -0.5]), teacher_log_probs=torch.tensor([-0.5, -3.0, -0.5])
    )
    result = compute_advantages("on_policy_distillation", inputs)
    assert result.advantages.tolist() == result.returns.tolist() == [0.5, -1.0, 0.0]
