"""Every algorithm on a whole model: what the actor does to it is what a plain Hugging Face loop does to it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import plain_loop
import pytest
import torch
from plain_loop import Algorithm
from test_actor import (
    FLAGS,
    SAMPLES_PER_STEP,
    SPLITS,
    STEPS,
    VOCABULARY,
    Lines,
    Rollout,
    make_rollout,
)
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles.batch import TrainBatch
from miles.config import parse
from miles.errors import CheckpointError, StepError
from miles.hooks import bind
from miles.observe import debug_data
from miles.observe.tracking import Tracker
from miles.trainer.actor import Restoring, TrainActor
from miles.trainer.critic import Critic, critic_optimizer
from miles.trainer.fsdp.backend import FsdpBackend
from miles.trainer.schedule import schedule_of
from miles.types import Sample

HOOKS = "custom_megatron_before_log_prob_hook_path", "custom_megatron_before_train_step_hook_path"


def write_model(path: Path, seed: int, **changes: Any) -> Path:
    """A small random Qwen3 with tied embeddings. One layer: packing and attention are tested in `test_actor`."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "eos_token_id": 1,
    }  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**settings | changes)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model that is trained, and another one as its reference."""
    root = tmp_path_factory.mktemp("algorithms")
    return write_model(root / "model", 0), write_model(root / "reference", 1)


def build(folder: Path, run_dir: Path, *flags: object, hooks: str | None = None) -> tuple[TrainActor, Lines]:
    """As a run builds it; `hooks` is a module whose Megatron hooks are called."""
    config, args = parse([*FLAGS, "--hf-checkpoint", str(folder), "--run-dir", str(run_dir), *map(str, flags)])
    if hooks is not None:
        vars(args).update({name: f"{__file__}:{name.removesuffix('_hook_path')}" for name in HOOKS})
    bound, lines = bind(args), Lines()
    tracker = Tracker(sinks=[lines])
    backend = FsdpBackend(str(folder), config.train, config.optimizer)
    backend.use_schedule(schedule_of(config.optimizer, STEPS))
    critic = None
    if config.algorithm.use_critic:
        optimizer = critic_optimizer(config.optimizer)
        values = FsdpBackend(str(folder), config.train, optimizer, role="critic", seed=config.run.seed)
        values.use_schedule(schedule_of(optimizer, STEPS))
        critic = Critic(values, config, args, bound, tracker)
    actor = TrainActor(
        backend, config, args, bound, tracker, transport=None, on_step=lambda: None, critic=critic
    )
    return actor, lines


def weights_of(actor: TrainActor) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in actor.backend.model_chunks[0].named_parameters()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# ---- the truth -----------------------------------------------------------------------------------------------------

REF = ("--ref-load", "REF")
KL_LOSS = (*REF, "--use-kl-loss", "--kl-loss-coef", "0.3")
PENALTY = (*REF, "--kl-coef", "0.2", "--normalize-advantages")
PPO = ("--advantage-estimator", "ppo", "--critic-lr", "2e-3")

CASES: dict[str, tuple[tuple[str, ...], Algorithm]] = {
    "gspo": (("--advantage-estimator", "gspo"), Algorithm("gspo")),
    "rloo": (("--advantage-estimator", "rloo"), Algorithm("rloo")),
    "cispo": (("--advantage-estimator", "cispo"), Algorithm("cispo")),
    "dr_grpo": (
        ("--advantage-estimator", "dr_grpo", "--rollout-max-response-len", "20"), Algorithm("dr_grpo", length=20.0)
    ),
    "dual clip": (("--eps-clip-c", "1.01"), Algorithm(dual_clip=1.01)),
    "opsm": (("--use-opsm", "--opsm-delta", "0.01"), Algorithm(opsm_delta=0.01)),
    "whitened": (("--normalize-advantages",), Algorithm(whiten=True)),
    "kl loss": (KL_LOSS, Algorithm(kl_loss_coef=0.3)),
    "kl loss k2": ((*KL_LOSS, "--kl-loss-type", "k2"), Algorithm(kl_loss_coef=0.3, kl="k2")),
    "kl loss, unbiased": (
        (*KL_LOSS, "--kl-loss-type", "low_var_kl", "--use-unbiased-kl"),
        Algorithm(kl_loss_coef=0.3, kl="low_var_kl", unbiased=True),
    ),
    "reinforce++": (
        (*PENALTY, "--advantage-estimator", "reinforce_plus_plus", "--gamma", "0.9"),
        Algorithm("reinforce_plus_plus", kl_coef=0.2, whiten=True, gamma=0.9),
    ),
    "reinforce++ with a baseline": (
        (*PENALTY, "--advantage-estimator", "reinforce_plus_plus_baseline", "--kl-loss-type", "k3"),
        Algorithm("reinforce_plus_plus_baseline", kl_coef=0.2, whiten=True, kl="k3"),
    ),
    "ppo": (PPO, Algorithm("ppo")),
    "ppo with everything": (
        (*PPO, *PENALTY, "--gamma", "0.99", "--lambd", "0.9", "--value-clip", "0.05"),
        Algorithm("ppo", kl_coef=0.2, whiten=True, gamma=0.99, lambd=0.9, value_clip=0.05),
    ),
    "the critic alone": (
        (*PPO, *PENALTY, "--num-critic-only-steps", "1"), Algorithm("ppo", critic_only=True, whiten=True)
    ),
}  # fmt: skip


LOSSES: dict[str, list[float]] = {}


@pytest.mark.parametrize("case", CASES)
def test_any_algorithm_equals_the_plain_loop(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    flags, algorithm = CASES[case]
    folder, ref = folders
    rollout = make_rollout()
    named = [str(ref) if flag == "REF" else flag for flag in flags]
    actor, lines = build(folder, tmp_path, *SPLITS["few tokens"], *named)
    head = torch.zeros(1, 32)
    if actor.critic is not None:
        head = actor.critic.backend.weights()["lm_head.weight"].clone()
    want = plain_loop.train(folder, ref, rollout, algorithm, per_step=SAMPLES_PER_STEP, head=head)
    LOSSES[case] = [round(x, 6) for x in want.losses]
    actor.train(0, rollout.batch(), SAMPLES_PER_STEP)
    logged = [line["train/loss"] for line in lines.steps if "train/loss" in line]
    assert logged == pytest.approx(want.losses, abs=2e-6)
    assert_same(weights_of(actor), want.weights)
    if actor.critic is not None:
        losses = [line["train/critic-value_loss"] for line in lines.steps if "train/critic-value_loss" in line]
        assert losses == pytest.approx(want.critic_losses, abs=1e-5)
        assert_same(weights_of(actor.critic), want.critic)
        assert all("train/critic-grad_norm" in x and "train/critic-lr-pg_0" in x for x in lines.steps[:STEPS])


def test_the_cases_differ() -> None:
    """Each does something that the others do not: the comparison above would notice if it were left out. (RLOO stands
    for GRPO; their rewards are prepared elsewhere.)"""
    if len(LOSSES) < len(CASES):
        pytest.skip("only some of the cases above ran")
    assert len({tuple(losses) for losses in LOSSES.values()}) == len(CASES)


SPLIT_CASES = {
    "grpo": (),
    "gspo with kl": ("--advantage-estimator", "gspo", *KL_LOSS),
    "per token": ("--calculate-per-token-loss", "--entropy-coef", "0.01"),
    "ppo": PPO,
}


@pytest.mark.parametrize("case", SPLIT_CASES)
def test_any_split_gives_the_same_gradient_in_double_precision(
    case: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """1e-10: loss and gradient of the last of two optimizer steps, whatever the micro-batches."""

    def run(split: str) -> tuple[list[float], list[dict[str, Tensor]]]:
        flags = [str(folders[1]) if flag == "REF" else flag for flag in SPLIT_CASES[case]]
        actor, lines = build(folders[0], tmp_path, *SPLITS[split], "--clip-grad", "0", *flags)
        trained = [actor] if actor.critic is None else [actor, actor.critic]
        for one in trained:
            one.backend.model.double()  # type: ignore[attr-defined]
        if actor.reference is not None:
            actor.reference.weights = {name: x.double() for name, x in actor.reference.weights.items()}
        batch = make_rollout().batch().select(range(2 * SAMPLES_PER_STEP))
        actor.train(0, batch, SAMPLES_PER_STEP)
        grads = [{n: p.grad for n, p in one.backend.model.named_parameters()} for one in trained]  # type: ignore[attr-defined]
        return [value for line in lines.steps for name, value in line.items() if "loss" in name], grads

    losses, grads = run("all at once")
    for split in ("one by one", "three", "few tokens"):
        other_losses, other_grads = run(split)
        assert other_losses == pytest.approx(losses, rel=1e-5)  # metrics are float32
        for one, other in zip(grads, other_grads):
            for name, grad in one.items():
                torch.testing.assert_close(other[name], grad, atol=1e-10, rtol=0)


# ---- reference and older policies ----------------------------------------------------------------------------------


def test_the_kl_of_the_policy_to_itself_is_zero(folders: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("--use-kl-loss", "--kl-loss-coef", "1", "--ref-load", folders[0])
    actor, lines = build(folders[0], tmp_path, *SPLITS["three"], *flags)
    actor.train(0, make_rollout().batch(), SAMPLES_PER_STEP)
    # Micro batches of the two passes hold other rows, and a matrix product may round them otherwise.
    assert abs(lines.steps[0]["train/kl_loss"]) < 1e-7 and abs(lines.steps[1]["train/kl_loss"]) > 1e-5


def test_the_engine_s_tensors_stay_what_they_are(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """During a pass with other weights, what `weights()` gave away is neither written nor replaced."""
    actor, _ = build(folders[0], tmp_path)
    backend = actor.backend
    given = backend.weights()
    before = {name: tensor.clone() for name, tensor in given.items()}
    other = backend.read_snapshot(folders[1], flag="--ref-load")
    name = "model.layers.0.mlp.up_proj.weight"
    with backend.using(other):
        assert torch.equal(backend.weights()[name], other[name])
        assert all(torch.equal(given[key], before[key]) for key in given)
    assert all(backend.weights()[key].data_ptr() == given[key].data_ptr() for key in given)
    kept = backend.snapshot()
    with torch.no_grad():
        given[name].add_(1.0)
    assert torch.equal(kept[name], before[name])


def test_a_pass_that_fails_gives_the_weights_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, _ = build(folders[0], tmp_path)
    given = actor.backend.weights()
    with pytest.raises(ZeroDivisionError), actor.backend.using(actor.backend.snapshot()):
        raise ZeroDivisionError
    assert all(actor.backend.weights()[key].data_ptr() == given[key].data_ptr() for key in given)


def test_the_reference_becomes_the_actor(folders: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("--use-kl-loss", "--ref-load", folders[1], "--ref-update-interval", "2")
    actor, _ = build(folders[0], tmp_path, *flags)
    assert actor.reference is not None
    first = dict(actor.reference.weights)
    actor.train(0, make_rollout().batch(), SAMPLES_PER_STEP)
    assert all(torch.equal(actor.reference.weights[name], first[name]) for name in first)
    actor.train(1, make_rollout().batch(), SAMPLES_PER_STEP)
    now = actor.backend.weights()
    assert all(torch.equal(actor.reference.weights[name], now[name]) for name in now)
    batch = make_rollout().batch()
    actor.train(2, batch, SAMPLES_PER_STEP)
    # The reference of the third rollout is its old policy.
    first_step = slice(0, int(batch.response_offsets[SAMPLES_PER_STEP]))
    ref, old = batch.response_columns["ref_log_probs"][first_step], batch.response_columns["log_probs"][first_step]
    torch.testing.assert_close(ref, old, atol=1e-5, rtol=0)


def test_a_reference_from_a_checkpoint(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = build(folders[1], tmp_path)
    saved = tmp_path / "ck" / "iter_0000003"
    saved.mkdir(parents=True)
    source.save(saved, with_optimizer=False)
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("3\n")
    want = source.backend.weights()
    for flags in ((tmp_path / "ck",), (tmp_path / "ck", "--ref-ckpt-step", 3), (saved,)):
        actor, _ = build(folders[0], tmp_path, "--use-kl-loss", "--ref-load", *flags)
        assert actor.reference is not None
        assert all(torch.equal(actor.reference.weights[name], want[name]) for name in want)


def test_references_that_are_none(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "wide", 2, intermediate_size=64)
    (tmp_path / "empty").mkdir()
    for given, says in (
        ((tmp_path / "absent",), "--ref-load .*absent: expected a Hugging Face model folder .* found no such folder"),
        ((tmp_path / "empty",), "neither a config.json nor a latest_checkpointed_iteration.txt"),
        ((tmp_path / "empty", "--ref-ckpt-step", 7), "found no iter_0000007 in it"),
        ((other,), r"--ref-load .*wide: the checkpoint is of another architecture than --hf-checkpoint:\n.*"),
    ):
        with pytest.raises(CheckpointError, match=says):
            build(folders[0], tmp_path, "--use-kl-loss", "--ref-load", *given)


def test_the_old_actor_is_one_update_older_than_what_is_served(folders: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = build(folders[0], tmp_path)
    actor, lines = build(folders[0], tmp_path, "--keep-old-actor")
    first, second = make_rollout().batch(), make_rollout().batch()
    actor.update_weights()
    actor.train(0, first, SAMPLES_PER_STEP)
    actor.update_weights()
    actor.train(1, second, SAMPLES_PER_STEP)
    # Both rollouts are judged by the weights from before the first one: those served before the last update.
    assert torch.equal(first.response_columns["log_probs"], second.response_columns["log_probs"])
    assert lines.steps[0]["train/ppo_kl"] == pytest.approx(0.0, abs=1e-7)
    assert abs(lines.steps[STEPS]["train/ppo_kl"]) > 1e-4
    plain.train(0, make_rollout().batch(), SAMPLES_PER_STEP)
    actor.update_weights()
    third = make_rollout().batch()
    actor.train(2, third, SAMPLES_PER_STEP)
    assert not torch.equal(third.response_columns["log_probs"], second.response_columns["log_probs"])


def test_an_old_actor_that_is_saved_after_the_update_goes_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A run that is stopped saves when the engines have the weights already; it resumes with an update all the same."""
    straight, _ = build(folders[0], tmp_path, "--keep-old-actor")
    straight.update_weights()
    straight.train(0, make_rollout().batch(), SAMPLES_PER_STEP)
    straight.update_weights()
    (tmp_path / "actor").mkdir()
    straight.save(tmp_path / "actor", with_optimizer=True)
    resumed, _ = build(folders[0], tmp_path, "--keep-old-actor")
    resumed.restore(tmp_path / "actor", Restoring(weight_version=1, steps_done=3))
    resumed.update_weights()
    for number in (1, 2):
        batches = make_rollout().batch(), make_rollout().batch()
        for actor, batch in zip((straight, resumed), batches):
            actor.train(number, batch, SAMPLES_PER_STEP)
            actor.update_weights()
        assert torch.equal(batches[0].response_columns["log_probs"], batches[1].response_columns["log_probs"])


RESUMED = {
    "ppo with a moving reference": (*PPO, "--kl-coef", "0.1", "--ref-load", "REF", "--ref-update-interval", "1"),
    "old actor": ("--keep-old-actor",),
    "optimizer forgotten": (*PPO, "--reset-optimizer-states"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_save_and_restore_continue_bitwise(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    flags = [str(folders[1]) if flag == "REF" else flag for flag in RESUMED[case]]

    def rollout(actor: TrainActor, number: int) -> None:
        actor.train(number, make_rollout().batch(), SAMPLES_PER_STEP)
        actor.update_weights()

    straight, _ = build(folders[0], tmp_path, *flags)
    straight.update_weights()
    rollout(straight, 0)
    (tmp_path / "actor").mkdir()
    # A run saves before it updates the engines, and updates them again when it resumes.
    straight.train(1, make_rollout().batch(), SAMPLES_PER_STEP)
    straight.save(tmp_path / "actor", with_optimizer=True)
    straight.update_weights()
    rollout(straight, 2)

    resumed, _ = build(folders[0], tmp_path, *flags)
    resumed.restore(tmp_path / "actor", Restoring(weight_version=2, steps_done=6))
    if resumed.critic is not None:
        resumed.restore_critic(tmp_path / "actor" / "critic", with_optimizer=True)
    resumed.update_weights()
    rollout(resumed, 2)
    pairs = [(straight, resumed)]
    if straight.critic is not None and resumed.critic is not None:
        pairs.append((straight.critic, resumed.critic))
    for one, other in pairs:
        a, b = weights_of(one), weights_of(other)
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---- the critic ----------------------------------------------------------------------------------------------------


def test_a_new_critic_depends_on_the_seed_alone(folders: tuple[Path, Path]) -> None:
    config, _ = parse([*FLAGS, "--hf-checkpoint", str(folders[0]), *PPO])
    heads = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(noise)
        backend = FsdpBackend(str(folders[0]), config.train, config.optimizer, role="critic", seed=seed)
        heads.append(backend.weights())
    assert torch.equal(heads[0]["lm_head.weight"], heads[1]["lm_head.weight"])
    assert not torch.equal(heads[0]["lm_head.weight"], heads[2]["lm_head.weight"])
    assert heads[0]["lm_head.weight"].shape == (1, 32) and heads[0]["lm_head.bias"].tolist() == [0.0]
    assert 0.01 < float(heads[0]["lm_head.weight"].std()) < 0.03


def test_a_critic_alone_leaves_the_actor_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, lines = build(folders[0], tmp_path, *PPO, "--num-critic-only-steps", "1")
    before = {name: tensor.clone() for name, tensor in weights_of(actor).items()}
    report = actor.train(0, make_rollout().batch(), SAMPLES_PER_STEP)
    assert actor.steps_done == 0 and report.metrics["train/step"] == STEPS - 1
    assert all(torch.equal(weights_of(actor)[name], before[name]) for name in before)
    assert not any("train/loss" in line for line in lines.steps)
    actor.train(1, make_rollout().batch(), SAMPLES_PER_STEP)
    assert actor.steps_done == STEPS and sum("train/loss" in line for line in lines.steps) == STEPS


SEEN: list[tuple[str, str]] = []


def custom_megatron_before_log_prob(args: Any, model: Any, store_prefix: str) -> None:
    SEEN.append((model[0].role, f"pass {store_prefix!r}"))


def custom_megatron_before_train_step(
    args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, opt_param_scheduler: Any
) -> None:
    assert optimizer.param_groups and opt_param_scheduler.optimizer is optimizer
    SEEN.append((model[0].role, f"step {step_id}"))


def test_plug_ins_are_called_for_every_pass_and_every_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    SEEN.clear()
    flags = (*PPO, "--kl-coef", "0.1", "--ref-load", folders[1])
    actor, _ = build(folders[0], tmp_path, *flags, hooks=__file__)
    actor.train(0, make_rollout().batch(), SAMPLES_PER_STEP)
    passes = [("critic", "pass ''"), ("actor", "pass 'ref_'"), ("actor", "pass ''")]
    assert passes == SEEN[:3]
    assert [(role, f"step {i}") for role in ("critic", "actor") for i in range(STEPS)] == SEEN[3:]


# ---- steps without a finite loss -------------------------------------------------------------------------------------


def nan_for_one(args: Any, parallel_state: Any, batch: dict[str, Any], logits: Tensor, reduce: Any) -> Any:
    """A constant NaN for sample 3: the gradient stays finite."""
    broken = 3 in batch["sample_indices"]
    loss = (logits * 0).sum() + (math.nan if broken else 1.0)
    return loss, {"loss": loss.detach()}


CUSTOM = ("--loss-type", "custom_loss", "--custom-loss-function-path", f"{__file__}:nan_for_one")


def broken_run(folder: Path, run_dir: Path, *flags: object) -> tuple[TrainActor, Rollout]:
    actor, _ = build(folder, run_dir, *SPLITS["three"], *CUSTOM, *flags)
    return actor, make_rollout()


def test_a_loss_of_nan_skips_the_step_and_keeps_its_samples(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, rollout = broken_run(folders[0], tmp_path)
    before = {name: tensor.clone() for name, tensor in weights_of(actor).items()}
    batch = rollout.batch().select(range(SAMPLES_PER_STEP))
    report = actor.train(4, batch, SAMPLES_PER_STEP)
    assert report.metrics["train/skipped_step"] == 1.0 and math.isnan(report.metrics["train/loss"])
    assert all(torch.equal(weights_of(actor)[name], before[name]) for name in before)
    assert not actor.backend.optimizer.state
    (notice,) = report.notices
    file = tmp_path / "failures" / "step_4_0_rank0.pt"
    assert "rollout 4, optimizer step 0: the loss is not finite for a micro-batch with sample" in notice
    assert "sample 3" in notice and "--nan-policy skip" in notice and str(file) in notice
    samples = debug_data.load(str(file), 4)
    assert [s.tokens for s in samples] == [p + r for p, r in zip(rollout.prompts, rollout.responses)][:SAMPLES_PER_STEP]
    assert [s.loss_mask for s in samples] == rollout.masks[:SAMPLES_PER_STEP]
    assert isinstance(samples[0], Sample) and samples[0].reward == pytest.approx(rollout.rewards[0])
    kept = debug_data.read_torch(file, flag="--load")["rollout_data"]
    assert {"advantages", "log_probs", "loss_masks"} <= set(kept)


def test_the_run_stops_where_that_is_asked_for(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, rollout = broken_run(folders[0], tmp_path, "--nan-policy", "stop")
    with pytest.raises(StepError, match=r"--nan-policy stop: rollout 0, optimizer step 0: the loss is not finite"):
        actor.train(0, rollout.batch(), SAMPLES_PER_STEP)
    assert (tmp_path / "failures" / "step_0_0_rank0.pt").is_file()


def test_later_steps_go_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, rollout = broken_run(folders[0], tmp_path)
    report = actor.train(0, rollout.batch(), SAMPLES_PER_STEP)
    assert len(report.notices) == 1 and report.metrics["train/skipped_step"] == 0.0
    assert actor.backend.scheduler.num_steps == STEPS - 1


def test_a_gradient_that_is_not_finite_is_told_apart(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, _ = build(folders[0], tmp_path, *SPLITS["three"], "--nan-policy", "stop", *PPO)
    assert actor.critic is not None
    with torch.no_grad():
        actor.critic.backend.weights()["lm_head.weight"][0, 0] = math.inf
    batch: TrainBatch = make_rollout().batch()
    with pytest.raises(StepError, match="rollout 0, critic step 0: "):
        actor.train(0, batch, SAMPLES_PER_STEP)
