"""What plug-ins can do wrong while a run goes: a table, plug point by kind, of wrong plug-ins and what the user sees.

`Wrong`      the run ends with a card; `says` is its message, `hint` its hint, word for word
`Harmless`   the run goes on, and its batch is the same as with a good plug-in
`Senseless`  there is no such thing at this plug point

That a second call raises is the same everywhere and stands in no row: `test_wrong_during_run` makes it of `GOOD`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from wrong_plug_ins import GOOD, Prompts, first, never_returning, prompts, returning

from miles.hooks import CATALOG
from miles.types import RolloutFnTrainOutput, Sample

KINDS = ("returns_none", "wrong_type", "wrong_length", "nan", "never_returns", "mutates_its_input")

NAN = float("nan")
LIMIT_S = 0.3
TOO_LONG = f"took longer than {LIMIT_S:g} s (--hook-timeout-s)"
BRANCHES = "does every branch of the function return a value?"
FINITE = "look for a division or a log of 0"
THROUGH_RM = "the samples went through --custom-rm-path, too"
LISTS = "the lists are those of the run: set sample.remove_sample, or work on copies"
SERVER = "a call that waits for a server needs a time limit of its own"


@dataclass(frozen=True)
class Wrong:
    plug_in: Any
    says: str
    hint: str = ""


@dataclass(frozen=True)
class Harmless:
    plug_in: Any
    because: str


@dataclass(frozen=True)
class Senseless:
    because: str


Cell = Wrong | Harmless | Senseless


def _none(point: str, says: str, hint: str = BRANCHES) -> Wrong:
    return Wrong(returning(GOOD[point], lambda value: None), says, hint)


def _gives(point: str, change: Any, says: str, hint: str = "") -> Wrong:
    return Wrong(returning(GOOD[point], change), says, hint)


def _forever(point: str) -> Wrong:
    return Wrong(never_returning(GOOD[point]), TOO_LONG, SERVER if CATALOG[point].awaited else "")


def _ignored(point: str, value: Any) -> Harmless:
    return Harmless(returning(GOOD[point], lambda _: value), "its return value is ignored")


def _spoils(point: str, spoil: Any, because: str) -> Harmless:
    return Harmless(first(GOOD[point], spoil), because)


NO_TIME_LIMIT = Senseless("a whole rollout may take hours: no time limit applies to it")
NO_RETURN_VALUE = Senseless("what it returns is ignored, so nothing in it can be too long or no number")
NOT_CALLED_YET = Senseless("its call site hands it nothing that a batch is made of")
A_CLASS = Senseless("a class is made, and its object handles requests: nothing is returned to a batch")
A_VALUE = Senseless("a list is not called; what is wrong in it is found before the start")

TABLE: dict[str, dict[str, Cell]] = {}

# ---- rollouts --------------------------------------------------------------------------------------------------------

TABLE["rollout_function"] = {
    "returns_none": _none("rollout_function", "returned None, expected a list of groups"),
    "wrong_type": _gives(
        "rollout_function", lambda groups: [[{"prompt": "1+1=?"}]], "returned groups that hold a dict, expected Samples"
    ),
    "wrong_length": _gives(
        "rollout_function", lambda groups: groups[:1],
        "The rollout gave 2 samples, fewer than one optimizer step of 4 (--global-batch-size). Let fewer groups be "
        "filtered away, raise --rollout-batch-size or --n-samples-per-prompt, or lower --global-batch-size.",
    ),
    "nan": _gives(
        "rollout_function", lambda groups: _with(groups, reward=NAN),
        "The reward of sample 0 is float nan. Expected a finite number.", THROUGH_RM,
    ),
    "never_returns": NO_TIME_LIMIT,
    "mutates_its_input": _spoils(
        "rollout_function", lambda args, rollout_id, data_source, **_: data_source.add_samples([]),
        "the data source is there to be changed: what is put into it comes back",
    ),
}  # fmt: skip
TABLE["eval_function"] = {
    "returns_none": _none("eval_function", "returned None, expected a dict: data set name -> {'rewards': [...]}"),
    "wrong_type": _gives(
        "eval_function", lambda data: RolloutFnTrainOutput(samples=[]),
        "returned RolloutFnTrainOutput RolloutFnTrainOutput(samples=[], metrics=None), expected a RolloutFnEvalOutput "
        "(evaluation=True)",
    ),
    "wrong_length": _gives(
        "eval_function", lambda data: {"held": {"samples": []}}, "data set 'held' has no 'rewards'",
        "each data set needs a list of rewards",
    ),
    "nan": _gives(
        "eval_function", lambda data: {"held": {"rewards": [1.0, NAN]}},
        "rewards[1] of data set 'held': float nan, expected a finite number",
    ),
    "never_returns": NO_TIME_LIMIT,
    "mutates_its_input": _spoils(
        "eval_function", lambda args, rollout_id, data_source, **_: data_source.add_samples([]),
        "an evaluation has the data source of the run, as published",
    ),
}  # fmt: skip


def _with(groups: Any, **fields: Any) -> Any:
    for sample in (s for group in groups for s in group):
        vars(sample).update(fields)
    return groups


# ---- one sample ------------------------------------------------------------------------------------------------------

TABLE["custom_generate_function"] = {
    "returns_none": _none(
        "custom_generate_function", "returned None, expected the Sample", "end the function with `return sample`"
    ),
    "wrong_type": _gives(
        "custom_generate_function", lambda sample: sample.response,
        "returned str '89', expected a Sample, a list of Samples or a GenerateFnOutput",
    ),
    "wrong_length": _gives(
        "custom_generate_function", lambda sample: _but(sample, loss_mask=[1]),
        "loss_mask length of sample 0 is 1, its response_length is 2. Expected one entry per response token.",
        THROUGH_RM,
    ),
    "nan": _gives(
        "custom_generate_function", lambda sample: _but(sample, rollout_log_probs=[-0.5, NAN]),
        "rollout_log_probs of sample 0 is nan at response token 1. Expected a finite number wherever the loss mask is "
        "1.", THROUGH_RM,
    ),
    "never_returns": _forever("custom_generate_function"),
    "mutates_its_input": _spoils(
        "custom_generate_function", lambda args, sample, sampling_params: sampling_params.clear(),
        "sampling_params belongs to this call alone",
    ),
}  # fmt: skip
TABLE["custom_rm"] = {
    "returns_none": _none("custom_rm", "returned None, expected a number"),
    "wrong_type": _gives("custom_rm", lambda value: "1.0", "returned str '1.0', expected a number",
                         "convert it: float(...)"),
    "wrong_length": _gives(
        "custom_rm", lambda value: [value, value], "returned list [0.0, 0.0], expected a number",
        "one sample has one reward; a function that scores several names its second parameter samples",
    ),
    "nan": _gives("custom_rm", lambda value: NAN, "returned float nan, expected a finite number", FINITE),
    "never_returns": _forever("custom_rm"),
    "mutates_its_input": Wrong(
        first(GOOD["custom_rm"], lambda args, sample: sample.tokens.clear()),
        "response_length of sample 0 is 1, but it has 0 tokens. Expected at least one token before the response: the "
        "first response token is predicted from it.",
    ),
}  # fmt: skip


def _but(sample: Sample, **fields: Any) -> Sample:
    vars(sample).update(fields)
    return sample


# ---- groups ----------------------------------------------------------------------------------------------------------

TABLE["dynamic_sampling_filter"] = {
    "returns_none": _none("dynamic_sampling_filter", "returned None for each of 32 groups, which drops them all",
                          "return DynamicFilterOutput(keep=..., reason=...)"),
    "wrong_type": _gives(
        "dynamic_sampling_filter", lambda verdict: (False, "same reward"),
        "returned tuple (False, 'same reward'), expected a DynamicFilterOutput or a bool",
        "return DynamicFilterOutput(keep=..., reason=...)",
    ),
    "wrong_length": _gives(
        "dynamic_sampling_filter", lambda verdict: torch.ones(2),
        "returned Tensor tensor([1., 1.]), expected a DynamicFilterOutput or a bool",
        "an array: .all() or .any()",
    ),
    "nan": _gives(
        "dynamic_sampling_filter", lambda verdict: NAN,
        "returned float nan, expected a DynamicFilterOutput or a bool", "a spread of one reward is NaN",
    ),
    "never_returns": _forever("dynamic_sampling_filter"),
    "mutates_its_input": Wrong(
        first(GOOD["dynamic_sampling_filter"], lambda args, samples: samples.clear()),
        "emptied 1 of the 1 groups", LISTS,
    ),
}  # fmt: skip
TABLE["buffer_filter"] = {
    "returns_none": _none("buffer_filter", "returned None, expected a list of groups"),
    "wrong_type": _gives(
        "buffer_filter", lambda groups: groups[0], "returned a list of Sample, expected a list of groups",
        "one inner list per prompt",
    ),
    "wrong_length": _gives(
        "buffer_filter", lambda groups: [groups[0][:1]], "returned a group of 1 samples, expected groups of 2"
    ),
    "nan": Senseless("groups hold no numbers of its making"),
    "never_returns": _forever("buffer_filter"),
    "mutates_its_input": Wrong(
        returning(lambda args, rollout_id, buffer, num_samples: buffer, lambda buffer: buffer),
        "returned groups that are still in the buffer, which would train them again",
        "remove what you take: taken = buffer[:num_samples]; del buffer[:num_samples]; return taken",
    ),
}  # fmt: skip
TABLE["rollout_sample_filter"] = {
    "returns_none": Harmless(GOOD["rollout_sample_filter"], "None is what it returns"),
    "wrong_type": _ignored("rollout_sample_filter", "text"),
    "wrong_length": _ignored("rollout_sample_filter", []),
    "nan": _ignored("rollout_sample_filter", NAN),
    "never_returns": _forever("rollout_sample_filter"),
    "mutates_its_input": Wrong(
        first(GOOD["rollout_sample_filter"], lambda args, groups: groups.clear()), "emptied the list of 2 groups", LISTS
    ),
}
TABLE["rollout_all_samples_process"] = {
    "returns_none": Harmless(GOOD["rollout_all_samples_process"], "None is what it returns"),
    "wrong_type": _ignored("rollout_all_samples_process", "text"),
    "wrong_length": _ignored("rollout_all_samples_process", []),
    "nan": _ignored("rollout_all_samples_process", NAN),
    "never_returns": _forever("rollout_all_samples_process"),
    "mutates_its_input": Wrong(
        first(GOOD["rollout_all_samples_process"], lambda args, groups, get_samples: groups[0].clear()),
        "emptied 1 of the 2 groups", LISTS,
    ),
}  # fmt: skip

# ---- flat samples, logging, data -------------------------------------------------------------------------------------

TABLE["custom_reward_post_process"] = {
    "returns_none": _none("custom_reward_post_process", "returned None, expected (raw_rewards, rewards)"),
    "wrong_type": _gives(
        "custom_reward_post_process", lambda pair: (1.0, 2.0),
        "raw_rewards is a float, expected a list with one per sample",
    ),
    "wrong_length": _gives(
        "custom_reward_post_process", lambda pair: (pair[0], pair[1][:3]), "rewards has 3 entries for 4 samples"
    ),
    "nan": _gives(
        "custom_reward_post_process", lambda pair: (pair[0], [NAN] * 4),
        "rewards[0] (sample 0): float nan, expected a finite number",
    ),
    "never_returns": _forever("custom_reward_post_process"),
    "mutates_its_input": Wrong(
        first(GOOD["custom_reward_post_process"], lambda args, samples: samples.reverse()),
        "changed the list of samples that it was given: its rewards belong to no sample any more",
        "work on a copy: ordered = sorted(samples, key=...)",
    ),
}  # fmt: skip
TABLE["custom_convert_samples_to_train_data"] = {
    "returns_none": _none("custom_convert_samples_to_train_data", "returned None, expected a dict of columns"),
    "wrong_type": _gives(
        "custom_convert_samples_to_train_data", lambda data: {**data, "tokens": 3},
        "'tokens' is an int, expected a list of token ids per row",
    ),
    "wrong_length": _gives(
        "custom_convert_samples_to_train_data", lambda data: {**data, "tokens": data["tokens"][:3]},
        "response_lengths: expected one entry per sample (3), got 4.",
    ),
    "nan": _gives(
        "custom_convert_samples_to_train_data", lambda data: {**data, "rewards": [NAN] * 4},
        "rewards[0]: float nan, expected a finite number",
    ),
    "never_returns": _forever("custom_convert_samples_to_train_data"),
    "mutates_its_input": Wrong(
        first(GOOD["custom_convert_samples_to_train_data"], lambda args, samples: samples.clear()),
        "returned no rows for 4 samples",
    ),
}  # fmt: skip
TABLE["custom_rollout_log_function"] = {
    "returns_none": Harmless(
        returning(GOOD["custom_rollout_log_function"], lambda _: None), "None: the default logging runs, too"
    ),
    "wrong_type": Harmless(
        returning(GOOD["custom_rollout_log_function"], lambda _: "yes"), "a value counts by its truth"
    ),
    "wrong_length": _gives(
        "custom_rollout_log_function", lambda _: torch.ones(2),
        "returned Tensor tensor([1., 1.]), expected True, False or None",
        "an array: .all() or .any()",
    ),
    "nan": Harmless(returning(GOOD["custom_rollout_log_function"], lambda _: NAN), "a value counts by its truth"),
    "never_returns": _forever("custom_rollout_log_function"),
    "mutates_its_input": _spoils(
        "custom_rollout_log_function", lambda rollout_id, args, samples, *_: samples.clear(), "its list is its own"
    ),
}  # fmt: skip
TABLE["custom_eval_rollout_log_function"] = {
    "returns_none": Harmless(
        returning(GOOD["custom_eval_rollout_log_function"], lambda _: None), "None: the default logging runs, too"
    ),
    "wrong_type": Harmless(
        returning(GOOD["custom_eval_rollout_log_function"], lambda _: "yes"), "a value counts by its truth"
    ),
    "wrong_length": _gives(
        "custom_eval_rollout_log_function", lambda _: torch.ones(2),
        "returned Tensor tensor([1., 1.]), expected True, False or None",
        "an array: .all() or .any()",
    ),
    "nan": Harmless(returning(GOOD["custom_eval_rollout_log_function"], lambda _: NAN), "a value counts by its truth"),
    "never_returns": _forever("custom_eval_rollout_log_function"),
    "mutates_its_input": _spoils(
        "custom_eval_rollout_log_function", lambda rollout_id, args, data, extra: (data["held"].clear(), data.clear()),
        "its dicts are its own",
    ),
}  # fmt: skip


class OfNothing(Prompts):
    def get_samples(self, num_samples: int) -> None: ...


class OfSamples(Prompts):
    def get_samples(self, num_samples: int) -> list[Sample]:
        return [Sample() for _ in range(num_samples)]


class OfHalves(Prompts):
    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        return [self.group()[:1] for _ in range(num_samples)]


class OfOneGroup(Prompts):
    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        return [self.group()] * num_samples


TABLE["data_source"] = {
    "returns_none": Wrong(
        OfNothing, "get_samples(2) returned no groups while rollout 0 still needs 2",
        "check the prompt data and the buffer filter",
    ),
    "wrong_type": Wrong(
        OfSamples, "get_samples(2) returned a list of Sample, expected groups: lists of "
        "Samples", "one inner list per prompt",
    ),
    "wrong_length": Wrong(
        OfHalves, "get_samples(2) returned a group of 1 samples",
        "each prompt has 2: --n-samples-per-prompt",
    ),
    "nan": Senseless("prompts hold no numbers"),
    "never_returns": Wrong(prompts(never_returning(GOOD["data_source"].get_samples)), TOO_LONG),
    "mutates_its_input": Wrong(
        OfOneGroup, "get_samples(2) returned one Sample object several times",
        "make a new Sample for each",
    ),
}  # fmt: skip

# ---- the router, and what built-in generate functions call -----------------------------------------------------------

TABLE["miles_router_middleware"] = dict.fromkeys(KINDS, A_CLASS)
TABLE["custom_agent_function"] = {
    "returns_none": Harmless(GOOD["custom_agent_function"], "None is what it may return"),
    "wrong_type": _ignored("custom_agent_function", "text"),
    "wrong_length": _ignored("custom_agent_function", []),
    "nan": _ignored("custom_agent_function", NAN),
    "never_returns": _forever("custom_agent_function"),
    "mutates_its_input": NOT_CALLED_YET,
}
TABLE["generate_tool_specs"] = dict.fromkeys(KINDS, A_VALUE)
TABLE["generate_execute_tool_function"] = {
    "returns_none": _none("generate_execute_tool_function", "returned None, expected text"),
    "wrong_type": _gives(
        "generate_execute_tool_function", lambda text: {"result": 4}, "returned dict {'result': 4}, expected text"
    ),
    "wrong_length": Harmless(
        returning(GOOD["generate_execute_tool_function"], lambda text: ""), "no text is text, too"
    ),
    "nan": _gives("generate_execute_tool_function", lambda text: NAN, "returned float nan, expected text"),
    "never_returns": _forever("generate_execute_tool_function"),
    "mutates_its_input": _spoils(
        "generate_execute_tool_function", lambda name, params: params.clear(), "nothing reads its params afterwards"
    ),
}

# ---- training --------------------------------------------------------------------------------------------------------

TABLE["rollout_data_postprocess"] = {
    "returns_none": Harmless(GOOD["rollout_data_postprocess"], "None is what it returns"),
    "wrong_type": _ignored("rollout_data_postprocess", "text"),
    "wrong_length": _ignored("rollout_data_postprocess", []),
    "nan": _ignored("rollout_data_postprocess", NAN),
    "never_returns": _forever("rollout_data_postprocess"),
    "mutates_its_input": Wrong(
        first(GOOD["rollout_data_postprocess"], lambda args, rollout_id, data: data["loss_masks"].pop()),
        "loss_masks: expected one entry per sample (4), got 3.",
    ),
}
TABLE["custom_loss_function"] = {
    "returns_none": _none("custom_loss_function", "returned None, expected (loss, metrics)"),
    "wrong_type": _gives(
        "custom_loss_function", lambda pair: (0.5, {}), "returned float 0.5, expected a scalar tensor",
        "compute it from the tensors that are passed in",
    ),
    "wrong_length": _gives(
        "custom_loss_function", lambda pair: (pair[0].expand(3), {}),
        "returned a tensor of shape [3], expected a scalar tensor", "sum or average it",
    ),
    "nan": Harmless(
        returning(GOOD["custom_loss_function"], lambda pair: (pair[0] * NAN, {})),
        "the step is skipped and said to be: no weight changes",
    ),
    "never_returns": _forever("custom_loss_function"),
    "mutates_its_input": _spoils(
        "custom_loss_function", lambda args, state, batch, logits, reduce: [m.zero_() for m in batch["loss_masks"]],
        "its batch is a copy, made for this call",
    ),
}  # fmt: skip
TABLE["custom_tis_function"] = {
    "returns_none": _none("custom_tis_function", "returned None, expected (pg_loss, masks, metrics)"),
    "wrong_type": _gives(
        "custom_tis_function", lambda result: (0.5, *result[1:]),
        "pg_loss is float 0.5, expected a tensor with one value per response token",
    ),
    "wrong_length": _gives(
        "custom_tis_function", lambda result: (result[0], result[1][:1], {}), "returned 1 masks for 4 samples"
    ),
    "nan": Harmless(
        returning(GOOD["custom_tis_function"], lambda result: (result[0] * NAN, *result[1:])),
        "the step is skipped and said to be: no weight changes",
    ),
    "never_returns": _forever("custom_tis_function"),
    "mutates_its_input": _spoils(
        "custom_tis_function", lambda **given: [m.zero_() for m in given["loss_masks"]],
        "its masks are copies: they count where it returns them",
    ),
}  # fmt: skip
TABLE["custom_pg_loss_reducer_function"] = {
    "returns_none": _none(
        "custom_pg_loss_reducer_function", "returned None, expected a function of the flat loss", ""
    ),
    "wrong_type": _gives(
        "custom_pg_loss_reducer_function", lambda reduce: 0.5, "returned a float, expected a function of the flat loss"
    ),
    "wrong_length": _gives(
        "custom_pg_loss_reducer_function", lambda reduce: lambda values: values.expand(7),
        "returned a tensor of shape [7], expected a scalar tensor", "sum or average it",
    ),
    "nan": Harmless(
        returning(GOOD["custom_pg_loss_reducer_function"], lambda reduce: lambda values: values.sum() * NAN),
        "the step is skipped and said to be: no weight changes",
    ),
    "never_returns": _forever("custom_pg_loss_reducer_function"),
    "mutates_its_input": _spoils(
        "custom_pg_loss_reducer_function", lambda total, response, masks, per_token: [m.zero_() for m in masks],
        "its masks are copies",
    ),
}  # fmt: skip
for _name in (
    "custom_megatron_init", "custom_megatron_before_log_prob_hook", "custom_megatron_before_train_step_hook",
    "custom_megatron_post_save_hook",
):  # fmt: skip
    TABLE[_name] = {
        "returns_none": Harmless(GOOD[_name], "None is what it returns"),
        "wrong_type": _ignored(_name, "text"),
        "wrong_length": _ignored(_name, []),
        "nan": _ignored(_name, NAN),
        "never_returns": _forever(_name),
        "mutates_its_input": NOT_CALLED_YET,
    }
TABLE["custom_model_provider"] = {
    "returns_none": _none("custom_model_provider", "returned None, expected a model"),
    "wrong_type": _gives(
        "custom_model_provider", lambda model: 3, "returned an int, expected a model: a torch.nn.Module"
    ),
    "wrong_length": Senseless("a model is one"),
    "nan": Senseless("weights that are no numbers are the checkpoint's"),
    "never_returns": _forever("custom_model_provider"),
    "mutates_its_input": Senseless("it is given two flags"),
}
