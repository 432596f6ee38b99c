"""What each form means at the call site: from the canonical call to the user's function and back.

One function per plug point that has several forms or a return value to check; every other plug-in is called as it is.
`adapt.recognise` has decided the form before; `call.Hook` times and guards what is made here.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from miles.hooks.adapt import Callee, is_async
from miles.hooks.catalog import CATALOG
from miles.hooks.point import Form, PlugPoint
from miles.hooks.threads import Threads
from miles.hooks.values import (
    BadReturn,
    generate_output,
    loss_of,
    metrics_of,
    of_type,
    reward_list,
    reward_problem,
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

Fn = Callable[..., Any]
AsyncFn = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class Adapted:
    """A plug-in in canonical shape.

    `call` is the canonical call (of a rollout function: what is called with the object that `build` makes).
    `batch` scores several samples at once, for reward functions that can; without it they are scored one by one.
    """

    call: Fn
    batch: AsyncFn | None = None
    build: Callable[[RolloutFnConstructorInput], Any] | None = None


def adapt(point: PlugPoint, callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    """`threads` run synchronous functions of awaited plug points; None calls them in place, for a debugger."""
    maker = _MAKERS.get(point.name)
    return Adapted(callee.obj) if maker is None else maker(callee, form, threads)


def awaitable(fn: Fn, threads: Threads | None) -> AsyncFn:
    """`fn` as a coroutine function. A synchronous one runs in a thread; what it returns is awaited where it can be."""
    if is_async(fn):
        return fn

    async def call(*args: Any, **kwargs: Any) -> Any:
        value = fn(*args, **kwargs) if threads is None else await threads.run(fn, *args, **kwargs)
        return await value if inspect.isawaitable(value) else value

    return call


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
        data = of_type(output.data, dict, "a dict: data set name -> {'rewards': [...]}")
        for name, entry in data.items():
            if not isinstance(entry, dict) or "rewards" not in entry:
                raise BadReturn("type", f"data set {name!r} has no 'rewards'", "each data set needs a list of rewards")
    else:
        groups = of_type(output.samples, (list, tuple), "a list of groups")
        stray = next((s for s in _leaves(groups) if not isinstance(s, Sample)), None)
        if stray is not None:
            raise BadReturn("type", f"returned groups that hold a {type(stray).__name__}, expected Samples")
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


def _reward(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = awaitable(callee.obj, threads)
    if form.name == "sample":
        return Adapted(fn)
    if form.name == "sample-or-samples":

        async def group(args: Namespace, samples: list[Sample]) -> list[Any]:
            return reward_list(await fn(args, samples), len(samples))

        return Adapted(fn, group)
    if form.name == "verl":
        return Adapted(_verl(callee, fn))
    batch = _trl(callee, fn) if form.name == "trl" else fn

    async def several(args: Namespace, samples: list[Sample]) -> list[Any]:
        return reward_list(await batch(args, samples), len(samples))

    async def single(args: Namespace, sample: Sample) -> Any:
        return (await several(args, [sample]))[0]

    return Adapted(single, several)


# Data set columns that foreign rewards read the expected answer from; `label` fills those that metadata lacks.
_ANSWER_COLUMNS = ("answer", "answers", "ground_truth", "label", "labels", "reference", "solution", "target")


def _trl(callee: Callee, fn: AsyncFn) -> AsyncFn:
    """TRL's `reward_func(prompts=, completions=, **columns)`; columns are the keys of `metadata`, plus `label`."""

    async def call(args: Namespace, samples: list[Sample]) -> Any:
        chat = all(isinstance(s.prompt, list) for s in samples)
        columns: dict[str, list[Any]] = {
            key: [s.metadata.get(key) for s in samples] for key in dict.fromkeys(k for s in samples for k in s.metadata)
        }
        labels = [s.label for s in samples]
        columns.setdefault("label", labels)
        for name in callee.names:
            if name in _ANSWER_COLUMNS:
                columns.setdefault(name, labels)
        columns["prompts"] = [s.prompt for s in samples]
        columns["completions"] = [
            [{"role": "assistant", "content": s.response}] if chat else s.response for s in samples
        ]
        columns["completion_ids"] = [s.tokens[len(s.tokens) - s.response_length :] for s in samples]
        return await fn(**{k: v for k, v in columns.items() if callee.takes_any_keyword or k in callee.names})

    return call


def _verl(callee: Callee, fn: AsyncFn) -> AsyncFn:
    """verl's `compute_score`; a dict counts by its `score` where no --reward-key says otherwise."""

    async def call(args: Namespace, sample: Sample) -> Any:
        passed = {
            "data_source": sample.metadata.get("data_source", ""),
            "solution_str": sample.response,
            "ground_truth": sample.label,
            "extra_info": sample.metadata.get("extra_info", sample.metadata),
        }
        value = await fn(**{k: v for k, v in passed.items() if callee.takes_any_keyword or k in callee.names})
        if isinstance(value, dict) and "score" in value and not vars(args).get("reward_key"):
            return value["score"]
        return value

    return call


# ---- groups -------------------------------------------------------------------------------------------------------


def _dynamic_filter(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj

    def call(args: Namespace, samples: list[Sample]) -> DynamicFilterOutput:
        value = fn(args, samples)
        if isinstance(value, DynamicFilterOutput):
            return value
        if value is None:
            return DynamicFilterOutput(keep=False, reason="returned_none")
        return DynamicFilterOutput(keep=bool(value))

    return Adapted(call)


def _buffer_filter(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj

    def live(args: Namespace, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
        taken: list[Group] = of_type(fn(args, rollout_id, buffer, num_samples), list, "a list of groups")
        if len(taken) > num_samples:
            raise BadReturn("length", f"returned {len(taken)} groups, at most {num_samples} were asked for")
        return taken

    def filtered(args: Namespace, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
        kept: list[Group] = of_type(fn(list(buffer)), list, "a list of groups")
        buffer[:] = kept[num_samples:]
        return kept[:num_samples]

    return Adapted(filtered if form.name == "groups" else live)


def _sample_filter(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj
    if form.name == "groups":
        return Adapted(fn)
    return Adapted(lambda args, groups: fn(args, _flat(groups)))


def _flat(groups: list[Any]) -> list[Sample]:
    """Samples of groups whose entries may be lists (several samples from one prompt)."""
    return [s for entry in groups for s in (_flat(entry) if isinstance(entry, list) else [entry])]


def _all_samples(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj
    return Adapted(fn) if form.name == "get-samples" else Adapted(lambda args, groups, get_samples: fn(args, groups))


# ---- training -----------------------------------------------------------------------------------------------------


def _data_postprocess(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj
    calls: dict[str, Fn] = {
        "rollout-id": fn,
        "rollout-data": lambda args, rollout_id, rollout_data: fn(args, rollout_data),
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
    fn, names = callee.obj, "(pg_loss, masks, metrics)"
    if form.name == "parallel-state":
        return Adapted(lambda **given: tuple_of(fn(**given), 3, names))

    def call(*, parallel_state: Any, **given: Any) -> Any:
        return tuple_of(fn(**given), 3, names)

    return Adapted(call)


def _pg_reducer(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj

    def call(*given: Any) -> Any:
        reducer = fn(*given)
        if not callable(reducer):
            raise BadReturn("type", f"returned a {type(reducer).__name__}, expected a function of the flat loss")
        return reducer

    return Adapted(call)


def _reward_post_process(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn, no_settings = callee.obj, Namespace()

    def call(args: Namespace, samples: list[Sample]) -> tuple[Any, Any]:
        raw, rewards = tuple_of(fn(args, samples), 2, "(raw_rewards, rewards)")
        for name, values in (("raw_rewards", raw), ("rewards", rewards)):
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
        data: dict[str, Any] = of_type(fn(args, samples), dict, "a dict of columns")
        if "tokens" not in data:
            columns = ", ".join(map(str, data)) or "none"
            raise BadReturn("type", "returned a dict without 'tokens'", f"columns: {columns}")
        rewards = data.get("rewards")
        for position, value in enumerate(rewards if isinstance(rewards, (list, tuple)) else ()):
            bad = reward_problem(value, no_settings)
            if bad is not None:
                raise BadReturn(bad.kind, f"rewards[{position}]: {bad}".replace("returned ", ""))
        return data

    return Adapted(call)


def _log(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = callee.obj
    return Adapted(lambda *given: bool(fn(*given)))


# ---- objects ------------------------------------------------------------------------------------------------------


def _data_source(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    def call(args: Namespace) -> Any:
        source = callee.obj(args)
        missing = [m for m in CATALOG["data_source"].methods if not callable(getattr(source, m, None))]
        if missing:
            raise BadReturn("type", f"made a {type(source).__name__} without {', '.join(missing)}")
        return source

    return Adapted(call)


def _model_provider(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn, takes_stage = callee.obj, _named(callee, "vp_stage")

    def call(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> Any:
        extra = {"vp_stage": vp_stage} if takes_stage else {}
        model = fn(pre_process=pre_process, post_process=post_process, **extra)
        return of_type(model, object, "a model")

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
    "custom_rm": _reward,
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
