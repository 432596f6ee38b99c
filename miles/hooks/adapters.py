"""What each form means at the call site: from the canonical call to the user's function and back.

One function per plug point that has several forms or a return value to check; every other plug-in is called as it is.
`adapt.recognise` has decided the form before; `call.Hook` times and guards what is made here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from miles.hooks.adapt import Callee
from miles.hooks.adapted import Adapted, Fn, awaitable
from miles.hooks.adapters_reward import reward
from miles.hooks.catalog import CATALOG
from miles.hooks.point import Form, PlugPoint
from miles.hooks.sample_views import SampleViews
from miles.hooks.threads import Threads
from miles.hooks.values import (
    BadReturn,
    buffer_groups,
    evaluation_data,
    filter_verdict,
    generate_output,
    kind_of,
    loss_of,
    metrics_of,
    of_type,
    reward_problem,
    tis_result,
    truth_of,
    tuple_of,
)
from miles.types import (
    DynamicFilterOutput,
    GenerateFnInput,
    GenerateFnOutput,
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalOutput,
    RolloutFnInput,
    RolloutFnTrainOutput,
    Sample,
)


def adapt(point: PlugPoint, callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    """`threads` run synchronous functions of awaited plug points; None calls them in place, for a debugger."""
    maker = _MAKERS.get(point.name)
    return Adapted(callee.obj) if maker is None else maker(callee, form, threads)


def _named(callee: Callee, name: str) -> bool:
    return name in callee.names


# ---- rollouts -----------------------------------------------------------------------------------------------------


@dataclass
class RolloutFunctionObject:
    """A rollout function in the place of a rollout class: called with an input, it passes what the function takes."""

    fn: Fn
    args: Namespace
    data_source: Any
    takes_data_source: bool

    def __call__(self, input: RolloutFnInput) -> Any:
        if self.takes_data_source:
            return self.fn(self.args, input.rollout_id, self.data_source, evaluation=input.evaluation)
        return self.fn(self.args, input.rollout_id, evaluation=input.evaluation)


def _rollout(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    def build(given: RolloutFnConstructorInput) -> Any:
        if form.target == "class":
            return callee.obj(given)
        return RolloutFunctionObject(callee.obj, given.args, given.data_source, form.name == "data-source")

    return Adapted(call=lambda obj, input: obj(input), build=build)


def rollout_output(value: Any, input: RolloutFnInput) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """Wrap a raw value. Raises BadReturn for None and for the output of the other kind."""
    wanted: Any = RolloutFnEvalOutput if input.evaluation else RolloutFnTrainOutput
    if isinstance(value, (RolloutFnTrainOutput, RolloutFnEvalOutput)):
        of_type(value, wanted, f"a {wanted.__name__} (evaluation={input.evaluation})")
        output = value
    else:
        output = wanted(value)
    if isinstance(output, RolloutFnEvalOutput):
        evaluation_data(output.data)
    else:
        groups = of_type(output.samples, (list, tuple), "a list of groups")
        stray = next((s for s in _leaves(groups) if not isinstance(s, Sample)), None)
        if stray is not None:
            raise BadReturn("type", f"returned groups that hold {kind_of(stray)}, expected Samples")
    return output


def _leaves(nested: Any) -> Iterator[Any]:
    for entry in nested:
        if isinstance(entry, (list, tuple)):
            yield from _leaves(entry)
        else:
            yield entry


# ---- one sample ---------------------------------------------------------------------------------------------------


def _generate(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = awaitable(callee.obj, threads)
    by_name = _named(callee, "evaluation")

    async def with_args(input: GenerateFnInput) -> GenerateFnOutput:
        extra = {"evaluation": input.evaluation} if by_name else {}
        return generate_output(await fn(input.args, input.sample, input.sampling_params, **extra))

    async def with_input(input: GenerateFnInput) -> GenerateFnOutput:
        return generate_output(await fn(input))

    return Adapted(with_input if form.name == "input" else with_args)


# ---- groups -------------------------------------------------------------------------------------------------------


# A filter that returns None for this many groups and nothing else has forgotten its `return`, and the rollout would
# never end.
_MAX_NONE = 32


def _dynamic_filter(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj
    nones = 0  # in a row from the first call on; below 0 once it has returned anything else

    def call(args: Namespace, samples: list[Sample]) -> DynamicFilterOutput:
        nonlocal nones
        value = _leaving_members(fn, args, samples, [samples])
        if value is not None:
            nones = -1
        elif nones >= 0:
            nones += 1
        if nones == _MAX_NONE:
            nones = 0
            found = f"returned None for each of {_MAX_NONE} groups, which drops them all"
            raise BadReturn("none", found, "return DynamicFilterOutput(keep=..., reason=...)")
        return filter_verdict(value)

    return Adapted(call)


def _buffer_filter(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj

    def live(args: Namespace, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
        size = vars(args).get("n_samples_per_prompt")
        taken = buffer_groups(fn(args, rollout_id, buffer, num_samples), size)
        left = {id(group) for group in buffer}
        if taken is buffer or any(id(group) in left for group in taken):
            raise BadReturn(
                "type", "returned groups that are still in the buffer, which would train them again",
                "remove what you take: taken = buffer[:num_samples]; del buffer[:num_samples]; return taken",
            )  # fmt: skip
        if len(taken) > num_samples:
            raise BadReturn("length", f"returned {len(taken)} groups, at most {num_samples} were asked for")
        return taken

    def filtered(args: Namespace, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
        kept = list(buffer_groups(fn(list(buffer)), vars(args).get("n_samples_per_prompt")))
        buffer[:] = kept[num_samples:]
        return kept[:num_samples]

    return Adapted(filtered if form.name == "groups" else live)


def _sample_filter(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj

    def live(args: Namespace, groups: list[Group]) -> Any:
        return _leaving_members(fn, args, groups, groups)

    return Adapted(live if form.name == "groups" else lambda args, groups: fn(args, _flat(groups)))


def _flat(groups: list[Any]) -> list[Sample]:
    """Samples of groups whose entries may be lists (several samples from one prompt)."""
    return [s for entry in groups for s in (_flat(entry) if isinstance(entry, list) else [entry])]


def _all_samples(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn, all_of_it = callee.obj, form.name == "get-samples"

    def call(args: Namespace, groups: list[Group], get_samples: Callable[[int], list[Group]]) -> Any:
        return _leaving_members(fn, args, groups, groups, *([get_samples] if all_of_it else []))

    return Adapted(call)


def _leaving_members(fn: Fn, args: Namespace, given: Any, groups: list[Group], *more: Any) -> Any:
    """`fn(args, given, *more)`. The groups are those of the run; BadReturn where it has emptied one, or all of them."""
    before = list(groups)
    value = fn(args, given, *more)
    emptied = sum(not group for group in before)
    if emptied or (before and not groups):
        what = f"{emptied} of the" if emptied else "the list of"
        hint = "the lists are those of the run: set sample.remove_sample, or work on copies"
        raise BadReturn("length", f"emptied {what} {len(before)} groups", hint)
    return value


# ---- training -----------------------------------------------------------------------------------------------------


def _data_postprocess(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj

    def with_views(args: Namespace, rollout_id: int, rollout_data: Any) -> Any:
        views = SampleViews(rollout_data)
        value = fn(args, views.groups(args) if form.name == "groups" else views.flat())
        views.write_back()
        return value

    calls: dict[str, Fn] = {
        "rollout-id": fn,
        "rollout-data": lambda args, rollout_id, rollout_data: fn(args, rollout_data),
        "groups": with_views,
        "samples": with_views,
        "args": lambda args, rollout_id, rollout_data: fn(args),
    }
    return Adapted(calls[form.name])


def _loss(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn, with_state = callee.obj, form.name == "parallel-state"

    def call(args: Namespace, parallel_state: Any, batch: Any, logits: Any, sum_of_sample_mean: Fn) -> Any:
        passed = (parallel_state, batch) if with_state else (batch,)
        loss, metrics = tuple_of(fn(args, *passed, logits, sum_of_sample_mean), 2, "(loss, metrics)")
        return loss_of(loss), metrics_of(metrics)

    return Adapted(call)


def _tis(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj
    if form.name == "parallel-state":
        return Adapted(lambda **given: tis_result(fn(**given), given))

    def call(*, parallel_state: Any, **given: Any) -> Any:
        return tis_result(fn(**given), given)

    return Adapted(call)


def _pg_reducer(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj

    def call(*given: Any) -> Any:
        reducer = fn(*given)
        if not callable(reducer):
            raise BadReturn("type", f"returned {kind_of(reducer)}, expected a function of the flat loss")
        return reducer

    return Adapted(call)


def _reward_post_process(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn, no_settings = callee.obj, Namespace()

    def call(args: Namespace, samples: list[Sample]) -> tuple[Any, Any]:
        given = list(samples)
        raw, rewards = tuple_of(fn(args, given), 2, "(raw_rewards, rewards)")
        if len(given) != len(samples) or any(a is not b for a, b in zip(given, samples)):
            raise BadReturn(
                "type", "changed the list of samples that it was given: its rewards belong to no sample any more",
                "work on a copy: ordered = sorted(samples, key=...)",
            )  # fmt: skip
        for name, values in (("raw_rewards", raw), ("rewards", rewards)):
            if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__len__"):
                raise BadReturn("type", f"{name} is {kind_of(values)}, expected a list with one per sample")
            if len(values) != len(samples):
                raise BadReturn("length", f"{name} has {len(values)} entries for {len(samples)} samples")
        for position, value in enumerate(rewards):
            bad = reward_problem(value, no_settings)
            if bad is not None:
                index = samples[position].index
                raise BadReturn(bad.kind, f"rewards[{position}] (sample {index}): {bad}".replace("returned ", ""))
        return raw, rewards

    return Adapted(call)


def _convert(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn, no_settings = callee.obj, Namespace(custom_convert_samples_to_train_data_path=callee.name)

    def call(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
        count = len(samples)
        data: dict[str, Any] = of_type(fn(args, samples), dict, "a dict of columns")
        if "tokens" not in data:
            columns = ", ".join(map(str, data)) or "none"
            raise BadReturn("type", "returned a dict without 'tokens'", f"columns: {columns}")
        if not hasattr(data["tokens"], "__len__"):
            raise BadReturn("type", f"'tokens' is {kind_of(data['tokens'])}, expected a list of token ids per row")
        if len(data["tokens"]) == 0:
            raise BadReturn("length", f"returned no rows for {count} samples")
        rewards = data.get("rewards")
        for position, value in enumerate(rewards if isinstance(rewards, (list, tuple)) else ()):
            bad = reward_problem(value, no_settings)
            if bad is not None:
                raise BadReturn(bad.kind, f"rewards[{position}]: {bad}".replace("returned ", ""))
        return data

    return Adapted(call)


def _log(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj
    return Adapted(lambda *given: truth_of(fn(*given), "True, False or None"))


# ---- objects ------------------------------------------------------------------------------------------------------


def _data_source(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    def call(args: Namespace) -> Any:
        source = callee.obj(args)
        missing = [m for m in CATALOG["data_source"].methods if not callable(getattr(source, m, None))]
        if missing:
            raise BadReturn("type", f"made {kind_of(source)} without {', '.join(missing)}")
        return source

    return Adapted(call)


def _model_provider(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn, takes_stage = callee.obj, _named(callee, "vp_stage")

    def call(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> Any:
        extra = {"vp_stage": vp_stage} if takes_stage else {}
        model = fn(pre_process=pre_process, post_process=post_process, **extra)
        if not callable(getattr(of_type(model, object, "a model"), "parameters", None)):
            raise BadReturn("type", f"returned {kind_of(model)}, expected a model: a torch.nn.Module")
        return model

    return Adapted(call)


def _agent(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn, takes_metadata = awaitable(callee.obj, threads), _named(callee, "metadata")

    async def call(*, base_url: str, prompt: Any, request_kwargs: Any, metadata: Any = None) -> Any:
        extra = {"metadata": metadata} if takes_metadata else {}
        return await fn(base_url=base_url, prompt=prompt, request_kwargs=request_kwargs, **extra)

    return Adapted(call)


def _tool(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = awaitable(callee.obj, threads)

    async def call(name: str, params: dict[str, Any]) -> str:
        text: str = of_type(await fn(name, params), str, "text")
        return text

    return Adapted(call)


def _value(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    return Adapted(lambda: callee.obj)


_MAKERS: dict[str, Callable[[Callee, Form, Threads | None], Adapted]] = {
    "rollout_function": _rollout,
    "eval_function": _rollout,
    "custom_generate_function": _generate,
    "custom_rm": reward,
    "dynamic_sampling_filter": _dynamic_filter,
    "buffer_filter": _buffer_filter,
    "rollout_sample_filter": _sample_filter,
    "rollout_all_samples_process": _all_samples,
    "rollout_data_postprocess": _data_postprocess,
    "custom_loss_function": _loss,
    "custom_tis_function": _tis,
    "custom_pg_loss_reducer_function": _pg_reducer,
    "custom_reward_post_process": _reward_post_process,
    "custom_convert_samples_to_train_data": _convert,
    "custom_rollout_log_function": _log,
    "custom_eval_rollout_log_function": _log,
    "data_source": _data_source,
    "custom_model_provider": _model_provider,
    "custom_agent_function": _agent,
    "generate_tool_specs": _value,
    "generate_execute_tool_function": _tool,
}
