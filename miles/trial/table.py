"""Plug point -> its trial, and why there is none."""

from __future__ import annotations

from miles.hooks.point import PlugPoint
from miles.trial import groups
from miles.trial.outcome import Outcome, Trial, TrialFunction
from miles.trial.reward import try_reward


def _training(name: str) -> TrialFunction:
    """A trial that needs torch, which is imported when it is made."""

    def run(trial: Trial) -> Outcome:
        from miles.trial import training

        return training.TRIALS[name](trial)

    return run


TRIALS: dict[str, TrialFunction] = {
    "custom_rm": try_reward,
    "dynamic_sampling_filter": groups.try_dynamic_filter,
    "buffer_filter": groups.try_buffer_filter,
    "rollout_sample_filter": groups.try_sample_filter,
    "rollout_all_samples_process": groups.try_all_samples,
    "custom_reward_post_process": groups.try_reward_post_process,
    "custom_convert_samples_to_train_data": groups.try_convert,
    "custom_rollout_log_function": groups.try_rollout_log,
    "custom_eval_rollout_log_function": groups.try_eval_log,
    "generate_tool_specs": groups.try_tool_specs,
    "rollout_data_postprocess": _training("rollout_data_postprocess"),
    "custom_loss_function": _training("custom_loss_function"),
    "custom_tis_function": _training("custom_tis_function"),
    "custom_pg_loss_reducer_function": _training("custom_pg_loss_reducer_function"),
}

# Plug points whose failed calls can be made again, but for which a record of rollouts holds too little.
_NEEDS_MORE = {
    "custom_generate_function": "It needs an engine that answers; `miles replay BUNDLE` makes one failed call again.",
    "generate_execute_tool_function": "A record holds no tool calls; `miles replay BUNDLE` makes a failed one again.",
}

# Said by `miles check` in the place of a value.
_NOT_CALLED = {
    "rollout_function": "it makes a whole rollout",
    "eval_function": "it makes a whole evaluation",
    "custom_generate_function": "it talks to an engine",
    "rollout_all_samples_process": "it is there for what it does outside",
    "custom_rollout_log_function": "it writes to logs",
    "custom_eval_rollout_log_function": "it writes to logs",
    "data_source": "it may read and write files",
    "custom_agent_function": "it talks to an engine",
    "generate_execute_tool_function": "it executes",
    "custom_megatron_post_save_hook": "it acts on a checkpoint",
    "miles_router_middleware": "it handles requests",
}


def why_not_called(point: PlugPoint) -> str | None:
    """Why `miles check` does not call a plug point; None where it does."""
    if point.pure:
        return None
    return _NOT_CALLED.get(point.name, "it works on a live model")


def why_not_replayed(point: PlugPoint) -> str | None:
    """Why `miles replay` cannot call a plug point on a recorded rollout, as a sentence; None where it can."""
    return point.replay or _NEEDS_MORE.get(point.name)
