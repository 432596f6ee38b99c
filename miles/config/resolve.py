"""From what the user wrote to what the run is: everything that depends on more than one flag, or on this machine.

    1. missing flags         all at once
    2. statuses              explicit flags that are not built (refused) or have no meaning here (a notice), which
                             depends on --train-backend;
                             then each value for itself, with the check that stands beside its field
    3. SUBSTITUTES           published defaults that this machine cannot honour
    4. EFFECTS               values that follow from others, in the published order
    5. EXCLUSIVE, NEEDS      flags that cannot stand together, or not alone

Each rule is a small function or a row of a table. They run once, before the sections are built and frozen. Those of
`--train-backend megatron` stand in `miles.config.megatron`.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from miles.config import engines, megatron, model_folder
from miles.config.draft import Draft
from miles.config.evaluation import resolve_eval_datasets
from miles.config.machine import local_gpus
from miles.config.rewards import resolve_reward
from miles.config.sections import FLAGS
from miles.config.unread import unread
from miles.errors import FlagError
from miles.hooks.catalog import CATALOG

Rule = Callable[[Draft], None]


def resolve(draft: Draft) -> None:
    """Work out all values of `draft`. Raises FlagError for what cannot be run."""
    draft.gpus = local_gpus()
    refuse_missing(draft)
    train_backend(draft)
    apply_statuses(draft)
    for name, flag in FLAGS.items():
        flag.verify(draft[name])  # before the formulas below use it
    for rule in (*OF_BACKEND[draft["train_backend"]], *SUBSTITUTES, *EFFECTS):
        rule(draft)
    refuse_exclusive(draft)
    refuse_lacking(draft)


# ---- 1. missing flags ----------------------------------------------------------------------------------------------


def refuse_missing(draft: Draft) -> None:
    missing = [f.option for f in FLAGS.values() if f.required and not draft.given(f.name)]
    missing += [text for text, present in ALTERNATIVES if not present(draft)]
    if missing:
        given = "required, but not given." if len(missing) == 1 else "all of these are required, but not given."
        empty_file = [n for n in draft.notices if n.startswith("--config ")]
        raise FlagError(", ".join(missing), given=given, remedy=" ".join(empty_file))


DEFAULT_DATA_SOURCE = FLAGS["data_source_path"].default

ALTERNATIVES: list[tuple[str, Callable[[Draft], bool]]] = [
    ("--hf-checkpoint", lambda d: d["hf_checkpoint"] is not None),
    ("--num-rollout (or --num-epoch)", lambda d: d["num_rollout"] is not None or d["num_epoch"] is not None),
    (
        "--global-batch-size (or --num-steps-per-rollout)",
        lambda d: bool(
            d["global_batch_size"]
            or d["num_steps_per_rollout"]
            or d["use_dynamic_global_batch_size"]
            or d["debug_rollout_only"]
        ),
    ),
    (
        "--prompt-data (or --disable-rollout-global-dataset)",
        lambda d: bool(
            d["prompt_data"] is not None
            or not d["rollout_global_dataset"]
            or d["data_source_path"] != DEFAULT_DATA_SOURCE
        ),
    ),
]
"""What a run cannot do without, where several flags can provide it."""


# ---- 2. statuses ---------------------------------------------------------------------------------------------------


def train_backend(draft: Draft) -> None:
    """Decided first: what a flag means depends on it."""
    draft.substitute("train_backend", "fsdp", "it trains Hugging Face models in one process, with or without a GPU.")
    if draft["train_backend"] == "megatron":
        megatron.refuse_missing_library(draft)
    for point in CATALOG.values():
        if draft.given(point.dest) and draft["train_backend"] not in point.backends and point.dest not in draft.claimed:
            raise FlagError(
                point.flag,
                given=f"--train-backend {draft['train_backend']} never calls it.",
                remedy=f"Use --train-backend {' or '.join(point.backends)}.",
            )


def apply_statuses(draft: Draft) -> None:
    """Explicit flags without meaning here: a notice each, but one for all of the other backend.

    All flags that are not built are refused at once.
    """
    refused: list[str] = []
    of_others: list[str] = []
    engine = engines.kind(draft)
    for name, flag in FLAGS.items():
        value, status = draft[name], flag.status.of(engine)
        if not draft.given(name) or name in draft.claimed:
            continue
        if flag.only not in (None, draft["train_backend"]):
            of_others += [draft.shown(name)] if value != flag.default else []
            continue
        if not status.applies_to(value, flag.default):
            continue
        shown = draft.shown(name)
        if status.kind == "not_built":
            refused.append(f"{shown}: {status.sentence.rstrip(',')} is not built yet.")
        else:
            draft.notices.append(f"{shown}: no meaning here, {status.sentence}")
    if of_others:
        draft.notices.append(f"{', '.join(of_others)}: no meaning with --train-backend {draft['train_backend']}.")
    if refused:
        flag_text, _, rest = "\n".join(refused).partition(": ")
        raise FlagError(flag_text, given=rest)


# ---- 3. what this machine cannot honour ----------------------------------------------------------------------------


def one_trainer_process(draft: Draft) -> None:
    draft.substitute("actor_num_gpus_per_node", 1, "give a number to train in several processes.")


def gpus_of_this_machine(draft: Draft) -> None:
    draft.substitute("num_gpus_per_node", max(1, local_gpus()), "that is what this machine has.")


def gloo(draft: Draft) -> None:
    if local_gpus() == 0:
        draft.substitute("distributed_backend", "gloo", "nccl needs GPUs.")


def fused_attention(draft: Draft) -> None:
    draft.substitute("attn_implementation", "sdpa", "PyTorch's fused attention runs on packed rows everywhere.")


def at_least_one_engine(draft: Draft) -> None:
    """Published formulas divide by `rollout_num_gpus`."""
    if not draft["rollout_num_gpus"]:
        draft.derive("rollout_num_gpus", 1)


SUBSTITUTES: list[Rule] = [gpus_of_this_machine, gloo, at_least_one_engine]
OF_BACKEND: dict[str, list[Rule]] = {
    "fsdp": [one_trainer_process, fused_attention],
    "megatron": megatron.SUBSTITUTES,
}
"""Substitutes of one backend."""


# ---- 4. what follows from other flags ------------------------------------------------------------------------------


def run_dir(draft: Draft) -> None:
    draft.fill("run_dir", time.strftime("runs/%Y-%m-%d_%H%M%S"))
    draft.rewrite("run_dir", os.path.expanduser(draft["run_dir"]))


def folders_of_the_run(draft: Draft) -> None:
    """`{run_dir}` in a path stands for the run directory, so that one flag moves everything that a run writes."""
    for name in IN_RUN_DIR:
        path = draft[name]
        if path is not None:
            draft.rewrite(name, os.path.expanduser(path.replace("{run_dir}", draft["run_dir"])))
    for name in ("save", "load", "critic_save", "critic_load", "ref_load"):
        if draft[name] is not None and os.path.lexists(draft[name]) and not os.path.isdir(draft[name]):
            raise FlagError(draft.option(name), given=draft[name], expected="a folder", remedy="This is a file.")


def model(draft: Draft) -> None:
    if draft["hf_checkpoint"] is not None:
        model_folder.check(draft["hf_checkpoint"])


IN_RUN_DIR = (
    *("save", "load", "critic_save", "critic_load", "ref_load", "save_hf"),
    *("dump_details", "save_debug_rollout_data", "save_debug_train_data"),
)


def deterministic(draft: Draft) -> None:
    """`--deterministic` includes the trainer's published switch of that meaning."""
    if draft["deterministic"]:
        draft.derive("deterministic_mode", True)


def debug_dumps(draft: Draft) -> None:
    folder = draft["dump_details"]
    if folder is not None:
        draft.derive("save_debug_rollout_data", f"{folder}/rollout_data/{{rollout_id}}.pt")
        draft.derive("save_debug_train_data", f"{folder}/train_data/{{rollout_id}}_{{rank}}.pt")


def debug_replay(draft: Draft) -> None:
    """Recorded samples need no engine."""
    if draft["load_debug_rollout_data"] is not None:
        draft.derive("debug_train_only", True)


def colocation(draft: Draft) -> None:
    """Shared GPUs: offload both sides unless told otherwise, and as many GPUs for the engines as for the trainer."""
    if draft["offload"]:
        draft.fill("offload_train", True)
        draft.fill("offload_rollout", True)
    if draft["colocate"]:
        draft.fill("offload_train", True)
        draft.fill("offload_rollout", True)
        draft.derive("rollout_num_gpus", draft["actor_num_nodes"] * draft["actor_num_gpus_per_node"])
    draft.fill("offload_train", False)
    draft.fill("offload_rollout", False)


def debug_rollout(draft: Draft) -> None:
    """Without a trainer nothing is shared, and the trainer's size says nothing."""
    if not draft["debug_rollout_only"]:
        return
    gpus = draft["rollout_num_gpus"]
    draft.derive("actor_num_gpus_per_node", min(8, gpus))
    draft.derive("actor_num_nodes", gpus // draft["actor_num_gpus_per_node"])
    for name in ("colocate", "offload", "offload_train", "offload_rollout"):
        draft.derive(name, False)
    draft.derive("train_memory_margin_bytes", 0)


def critic_defaults(draft: Draft) -> None:
    for name, source in (
        ("critic_num_nodes", "actor_num_nodes"),
        ("critic_num_gpus_per_node", "actor_num_gpus_per_node"),
        ("critic_load", "load"),
        ("critic_lr", "lr"),
    ):
        draft.fill(name, draft[source])


def clip_range(draft: Draft) -> None:
    draft.fill("eps_clip_high", draft["eps_clip"])


def batch_size(draft: Draft) -> None:
    """global_batch_size = rollout_batch_size * n_samples_per_prompt // num_steps_per_rollout."""
    steps = draft["num_steps_per_rollout"]
    if steps is None:
        return
    samples = draft["rollout_batch_size"] * draft["n_samples_per_prompt"]
    size = samples // steps
    if size == 0:
        raise FlagError("--num-steps-per-rollout", given=steps, expected=f"at most {samples}, the samples of a rollout")
    if draft.given("global_batch_size") and draft["global_batch_size"] != size:
        raise FlagError(
            "--global-batch-size",
            given=draft["global_batch_size"],
            expected=f"{size} = {samples} samples / --num-steps-per-rollout {steps}",
            remedy="Leave one of the two out.",
        )
    draft.fill("global_batch_size", size)


def true_on_policy(draft: Draft, gpus: int) -> None:
    """Sums that are exact: in float32, on a CPU, in the built-in losses."""
    flag = "--true-on-policy-mode"
    if gpus:
        raise FlagError(flag, given="works on a CPU, and this machine has a GPU. Hide it: CUDA_VISIBLE_DEVICES= ...")
    if draft["fsdp_param_dtype"] != "float32":
        raise FlagError(flag, given="needs --fsdp-param-dtype float32, as the engine has it.")
    if draft["loss_type"] == "custom_loss":
        draft.notices.append(f"{flag}: a custom loss gets ordinary logits; its own log-probs are not exact.")


def trainer_processes(draft: Draft) -> None:
    """Whether as many processes as are asked for can run here, and can share an optimizer step equally."""
    if draft["debug_rollout_only"]:
        return
    if draft["train_backend"] == "megatron":
        megatron.check(draft, world_size(draft))
        communication(draft)
        shared_step(draft, megatron.sizes(draft, world_size(draft)).dp_size)
    else:
        fsdp_processes(draft)


def world_size(draft: Draft) -> int:
    processes: int = draft["actor_num_nodes"] * draft["actor_num_gpus_per_node"]
    return processes


def fsdp_processes(draft: Draft) -> None:
    """One process shares its memory with the engine; several have ranks, and a copy of the weights each."""
    world, gpus = world_size(draft), local_gpus()
    if draft["context_parallel_size"] > 1:
        raise FlagError(
            f"--context-parallel-size {draft['context_parallel_size']}",
            given="needs --train-backend megatron; with fsdp a sample is never divided.",
        )
    if draft["true_on_policy_mode"]:
        true_on_policy(draft, gpus)
    if draft["fsdp_cpu_offload"] and not gpus:
        draft.notices.append("--fsdp-cpu-offload: no meaning here, without a GPU everything is in main memory.")
    if world == 1:
        if draft["fsdp_cpu_offload"] and gpus:
            raise FlagError("--fsdp-cpu-offload", given=f"needs several trainer processes ({OF_TRAINER}).")
        if draft["fsdp_param_dtype"] != "float32":
            raise FlagError("--fsdp-param-dtype", given=f"needs several trainer processes ({OF_TRAINER}).")
        for name, why in OF_SEVERAL_PROCESSES.items():
            if draft.given(name) and draft[name] != FLAGS[name].default:
                draft.notices.append(f"{draft.shown(name)}: no meaning here, {why}")
        return
    communication(draft)
    shared_step(draft, world)


def communication(draft: Draft) -> None:
    """Whether this machine has a place for every process, and a library that connects them."""
    world, gpus = world_size(draft), local_gpus()
    if gpus and world > gpus:
        raise FlagError(OF_TRAINER, given=world, expected=f"at most {gpus}, the GPUs of this machine")
    expected = ("nccl", "gloo") if gpus else ("gloo",)
    if draft["distributed_backend"] not in expected:
        raise FlagError("--distributed-backend", given=draft["distributed_backend"], expected=" or ".join(expected))


def shared_step(draft: Draft, shares: int) -> None:
    """Every data-parallel share of the trainer gets equally many samples of a step."""
    size = draft["global_batch_size"]
    if size is None or size % shares == 0 or draft["use_dynamic_global_batch_size"]:
        return
    what = f"the trainer's processes ({OF_TRAINER})"
    if shares != world_size(draft):
        what = f"the data-parallel shares of {world_size(draft)} trainer processes"
    raise FlagError("--global-batch-size", given=size, expected=f"a multiple of {shares}, {what}")


OF_TRAINER = FLAGS["actor_num_gpus_per_node"].option


OF_SEVERAL_PROCESSES = {
    "balance_data": "one trainer process takes all samples.",
    "distributed_backend": "one trainer process has nobody to talk to.",
    "distributed_timeout_minutes": "one trainer process has nobody to wait for.",
    "update_weight_buffer_size": "the engine reads the weights of one trainer process in place.",
    "train_env_vars": "one trainer process is this one; set them in the shell.",
}
"""Flags that only a trainer in several processes reads, and why one has no use for them."""


def rollout_size(draft: Draft) -> None:
    """A slip of the keyboard must not look like a run that hangs while it makes its samples."""
    samples = draft["rollout_batch_size"] * draft["n_samples_per_prompt"]
    if samples > MAX_SAMPLES:
        raise FlagError(
            "--rollout-batch-size * --n-samples-per-prompt", given=samples, expected=f"at most {MAX_SAMPLES} samples"
        )


MAX_SAMPLES = 2**24
"""Samples of one rollout that no machine of today holds."""


def trimming(draft: Draft) -> None:
    """Say which samples of a full rollout are never trained, and refuse a step that no rollout can fill."""
    size, samples = draft["global_batch_size"], draft["rollout_batch_size"] * draft["n_samples_per_prompt"]
    if size is None or draft["use_dynamic_global_batch_size"] or draft["debug_rollout_only"]:
        return
    if draft["disable_rollout_trim_samples"] or samples % size == 0:
        return
    if samples > size:
        draft.notices.append(
            f"--global-batch-size {size}: {samples % size} of the {samples} samples of each rollout are cut off."
        )
    elif not any(draft.given(name) for name in MAY_MULTIPLY_SAMPLES):
        raise FlagError(
            "--global-batch-size",
            given=size,
            expected=f"at most {samples} = --rollout-batch-size * --n-samples-per-prompt",
        )


MAY_MULTIPLY_SAMPLES = ("rollout_function_path", "custom_generate_function_path", "load_debug_rollout_data")
"""With these, a rollout may bring more samples than prompts * samples per prompt."""


def group_of_one(draft: Draft) -> None:
    """A group of one has no standard deviation."""
    if draft["n_samples_per_prompt"] == 1:
        draft.derive("grpo_std_normalization", False)


def over_sampling(draft: Draft) -> None:
    draft.fill("over_sampling_batch_size", draft["rollout_batch_size"])
    if draft["over_sampling_batch_size"] < draft["rollout_batch_size"]:
        raise FlagError(
            "--over-sampling-batch-size",
            given=draft["over_sampling_batch_size"],
            expected=f"at least --rollout-batch-size {draft['rollout_batch_size']}",
        )


MULTI_TURN = "miles.rollout.generate_hub.multi_turn.generate"


def multi_turn(draft: Draft) -> None:
    """What the built-in conversation with tools cannot do without, and what it cannot do."""
    path = draft["custom_generate_function_path"]
    if path is None or path.replace(":", ".") != MULTI_TURN:
        return
    needed = {
        "--generate-execute-tool-function-path": draft["generate_execute_tool_function_path"],
        "--generate-tool-call-parser": draft.extras.get("generate_tool_call_parser"),
    }
    missing = [option for option, value in needed.items() if value is None]
    if missing:
        raise FlagError(f"--custom-generate-function-path {path}", given=f"needs {' and '.join(missing)}.")
    if draft["partial_rollout"]:
        raise FlagError("--partial-rollout", given=f"{path} cannot go on with a conversation that was cut short.")


AGENTIC = "miles.rollout.generate_hub.agentic_tool_call.generate"


def agentic(draft: Draft) -> None:
    """What the built-in generation with an agent cannot do without, and what it cannot do."""
    path = draft["custom_generate_function_path"]
    if path is None or path.replace(":", ".") != AGENTIC:
        if draft["custom_agent_function_path"] is not None and path is None:
            draft.notices.append(
                f"--custom-agent-function-path: no meaning here, without --custom-generate-function-path {AGENTIC}."
            )
        return
    needed = {
        "--custom-agent-function-path": draft["custom_agent_function_path"],
        "--use-miles-router (agents talk to its sessions)": draft["use_miles_router"] or None,
    }
    missing = [option for option, value in needed.items() if value is None]
    if missing:
        raise FlagError(f"--custom-generate-function-path {path}", given=f"needs {' and '.join(missing)}.")
    if draft["partial_rollout"]:
        raise FlagError("--partial-rollout", given=f"{path} cannot go on with a conversation that was cut short.")


BUILT_IN_ROLLOUTS = (
    "miles.rollout.sglang_rollout.generate_rollout",
    "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn",
)


def prompts_of_the_rollout(draft: Draft) -> None:
    """Without the global data set only a rollout function of one's own knows where prompts come from."""
    if not draft["rollout_global_dataset"] and draft["rollout_function_path"] in BUILT_IN_ROLLOUTS:
        raise FlagError(
            "--disable-rollout-global-dataset",
            given="needs a rollout function of your own (--rollout-function-path).",
            remedy="A data source of your own (--data-source-path) works with the built-in one without this flag.",
        )


def partial_rollout(draft: Draft) -> None:
    if draft["mask_offpolicy_in_partial_rollout"] and not draft["partial_rollout"]:
        draft.notices.append("--mask-offpolicy-in-partial-rollout: no meaning here, there is no --partial-rollout.")


def log_prob_tokens(draft: Draft) -> None:
    if draft["max_tokens_per_gpu"] is not None:
        draft.fill("log_probs_max_tokens_per_gpu", draft["max_tokens_per_gpu"])


def prompt_length(draft: Draft) -> None:
    """A prompt must leave room for one token of the response."""
    context = draft["rollout_max_context_len"]
    if context is None:
        return
    draft.fill("rollout_max_prompt_len", context - 1)
    if draft["rollout_max_prompt_len"] > context - 1:
        raise FlagError(
            "--rollout-max-prompt-len",
            given=draft["rollout_max_prompt_len"],
            expected=f"at most {context - 1} = --rollout-max-context-len - 1",
        )


def evaluation(draft: Draft) -> None:
    draft.fill("eval_function_path", draft["rollout_function_path"])
    draft.fill("eval_reward_key", draft["reward_key"])
    draft.fill("eval_max_context_len", draft["rollout_max_context_len"])
    draft.eval_datasets = resolve_eval_datasets(Namespace(**draft.values))
    flat = [text for d in draft.eval_datasets for text in (d.name, d.path)] or None
    if draft["eval_config"] is None:
        draft.rewrite("eval_prompt_data", flat)
    else:
        draft.derive("eval_prompt_data", flat)
    if draft["eval_interval"] is None:
        return
    if not draft.eval_datasets:
        raise FlagError("--eval-interval", given="there is nothing to evaluate on.", remedy="Give --eval-prompt-data.")
    if draft["group_rm"] and not draft.given("eval_function_path"):
        raise FlagError(
            "--group-rm",
            given="rewards of whole groups are not defined for evaluation.",
            remedy="Leave --eval-interval out, or evaluate with an --eval-function-path of your own.",
        )


def epochs(draft: Draft) -> None:
    if draft["num_rollout"] is not None and draft["num_epoch"] is not None:
        draft.notices.append("--num-epoch: no meaning here, --num-rollout says how long the run is.")


def routing_replay(draft: Draft) -> None:
    if draft["use_rollout_routing_replay"]:
        draft.derive("use_routing_replay", True)


def training_temperature(draft: Draft) -> None:
    """The trainer divides logits by the temperature."""
    trains = draft["num_rollout"] != 0 and not draft["debug_rollout_only"]
    if (trains or draft["loss_type"] == "sft_loss") and draft["rollout_temperature"] == 0:
        raise FlagError("--rollout-temperature", given=0, expected="a value > 0 for training")


def whitening(draft: Draft) -> None:
    estimator = draft["advantage_estimator"]
    if estimator.startswith("reinforce_plus_plus") and not draft["normalize_advantages"]:
        raise FlagError(f"--advantage-estimator {estimator}", given="needs --normalize-advantages.")


def policy_loss_inputs(draft: Draft) -> None:
    """The built-in policy loss has nothing to weigh log-probs with."""
    if draft["loss_type"] == "policy_loss" and not draft["compute_advantages_and_returns"]:
        needs = "needs --loss-type sft_loss or custom_loss: the policy loss reads advantages."
        raise FlagError("--disable-compute-advantages-and-returns", given=needs)


def critic_inputs(draft: Draft) -> None:
    """A critic learns from returns, and an actor that stops learning from it would learn from nothing."""
    if draft["advantage_estimator"] == "ppo" and not draft["compute_advantages_and_returns"]:
        raise FlagError("--advantage-estimator ppo", given="excludes --disable-compute-advantages-and-returns.")
    if draft["critic_save"] is not None and draft["save"] is None:
        raise FlagError("--critic-save", given="needs --save: actor and critic are saved together.")


EFFECTS: list[Rule] = [
    run_dir,
    folders_of_the_run,
    model,
    deterministic,
    debug_dumps,
    debug_replay,
    colocation,
    engines.choose,
    debug_rollout,
    critic_defaults,
    clip_range,
    rollout_size,
    batch_size,
    trainer_processes,
    trimming,
    group_of_one,
    over_sampling,
    prompts_of_the_rollout,
    multi_turn,
    agentic,
    partial_rollout,
    log_prob_tokens,
    prompt_length,
    evaluation,
    resolve_reward,
    epochs,
    routing_replay,
    training_temperature,
    whitening,
    policy_loss_inputs,
    critic_inputs,
    engines.check,
    unread,
]


# ---- 5. what cannot stand together, or not alone -------------------------------------------------------------------

EXCLUSIVE: list[tuple[str, str, str]] = [
    ("use_tis", "use_rollout_logprobs", "with the engine's log-probs as old policy there is no ratio to correct."),
    ("kl_coef", "kl_loss_coef", "the KL counts either in the advantages or in the loss."),
    ("debug_rollout_only", "debug_train_only", "nothing would be left to do."),
    ("prefill_num_servers", "rollout_external", "the servers of others cannot be divided."),
    ("lr_warmup_iters", "lr_warmup_fraction", "both say how long the warm-up is."),
    ("use_checkpoint_lr_scheduler", "override_lr_scheduler", "both say whose schedule counts on resume."),
]
"""Two flags and why they exclude each other."""

NEEDS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("save_interval", bool, "save"),
    ("get_mismatch_metrics", bool, "custom_tis_function_path"),
    ("loss_type", lambda v: v == "custom_loss", "custom_loss_function_path"),
    ("use_dynamic_batch_size", bool, "max_tokens_per_gpu"),
    ("advantage_estimator", lambda v: v == "dr_grpo", "rollout_max_response_len"),
    ("use_kl_loss", bool, "ref_load"),
    ("kl_coef", bool, "ref_load"),
    ("enable_mtp_training", bool, "mtp_num_layers"),
    ("rollout_external", bool, "rollout_external_engine_addrs"),
    ("load_debug_rollout_data_subsample", bool, "load_debug_rollout_data"),
    ("lr_decay_style", lambda v: v == "WSD", "lr_wsd_decay_iters"),
    ("ci_metric_checker_key", bool, "ci_metric_checker_threshold"),
    ("ci_metric_checker_key", bool, "eval_interval"),
]
"""A flag, the values that matter, and the flag that it needs."""


def refuse_exclusive(draft: Draft) -> None:
    if draft["advantage_estimator"] == "dr_grpo" and draft["calculate_per_token_loss"]:
        raise FlagError(
            "--advantage-estimator dr_grpo",
            given="excludes --calculate-per-token-loss: it divides by a constant, not by the number of tokens.",
        )
    for first, second, why in EXCLUSIVE:
        if draft[first] and draft[second]:
            raise FlagError(draft.option(first), given=f"excludes {draft.option(second)}: {why}")
    if draft["qkv_format"] == "bshd" and (draft["train_backend"] == "fsdp" or draft["use_dynamic_batch_size"]):
        raise FlagError("--qkv-format bshd", given="needs --train-backend megatron without --use-dynamic-batch-size.")
    if draft["qkv_format"] == "bshd" and draft["context_parallel_size"] > 1:
        raise FlagError("--qkv-format bshd", given="excludes --context-parallel-size: only packed samples are divided.")


def refuse_lacking(draft: Draft) -> None:
    for name, matters, needed in NEEDS:
        if matters(draft[name]) and draft[needed] is None:
            value = draft[name]
            shown = draft.option(name) if value is True else f"{draft.option(name)} {value}"
            raise FlagError(shown, given=f"needs {draft.option(needed)}.")
