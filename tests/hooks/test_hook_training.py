"""Plug points of the trainer, of the router, and those that built-in generate functions load."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

import pytest
import torch
from hooks_helpers import bound, bound_hooks

from miles.errors import HookError, UsageError
from miles.hooks import Hook, bind, function_registry

ARGS = Namespace()
DATA = {"tokens": [[1]]}


def seen(hook: Hook) -> list[Any]:
    entries: list[Any] = hook.target.__globals__["SEEN"]
    return entries


@pytest.mark.parametrize(
    ("name", "form", "received"),
    [
        ("post_one", "args", ("one", ARGS)),
        ("post_two", "rollout-data", ("two", DATA)),
        ("post_guide", "rollout-data", ("two", DATA)),
        ("post_two_with_option", "rollout-data", ("two", DATA)),
        ("post_three", "rollout-id", ("three", 5, DATA)),
    ],
)
def test_rollout_data_postprocess(name: str, form: str, received: Any) -> None:
    hook = bound("rollout_data_postprocess", f"training:{name}")
    seen(hook).clear()
    assert hook(ARGS, 5, DATA) is None
    assert hook.form == form and seen(hook) == [received]


@pytest.mark.parametrize(
    ("point", "name", "flag"),
    [
        ("rollout_data_postprocess", "post_anything", "rollout-data-postprocess"),
        ("custom_loss_function", "loss_anything", "custom-loss-function"),
    ],
)
def test_ambiguous_ones_name_the_flag(point: str, name: str, flag: str) -> None:
    with pytest.raises(UsageError, match=f"fits several forms(.|\n)*--hook-form {flag}="):
        bound(point, f"training:{name}")


@pytest.mark.parametrize(
    ("name", "form", "metrics"),
    [
        ("loss_five", "parallel-state", {"parallel_state": 7}),
        ("loss_four", "no-parallel-state", {"batch": 8}),
        ("loss_four_with_option", "no-parallel-state", {"scale": 1.0}),
    ],
)
def test_loss(name: str, form: str, metrics: dict[str, Any]) -> None:
    hook = bound("custom_loss_function", f"training:{name}")
    logits = torch.tensor(2.0, requires_grad=True)
    loss, got = hook(ARGS, 7, 8, logits, lambda x: x + 1)
    assert (float(loss.detach()), got) == (3.0, metrics)
    assert hook.form == form


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "returned None, expected (loss, metrics)"),
        ((0.5, {}), "returned float 0.5, expected a scalar tensor"),
        ((torch.ones(2), {}), "returned a tensor of shape [2], expected a scalar tensor"),
        ((torch.ones(()), {}), "returned a loss without gradient"),
        ((torch.ones((), requires_grad=True), None), "expected (loss, metrics) with a dict of metrics"),
        ((torch.ones((), requires_grad=True), {"kl": "low"}), "metric 'kl' is str 'low', expected a number"),
        ((torch.ones((), requires_grad=True), {"kl": torch.ones(3)}), "metric 'kl' is Tensor"),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_trained_on(value: Any, says: str) -> None:
    with function_registry.temporary("test:loss", lambda args, parallel_state, batch, logits, reduce: value):
        hook = bind(Namespace(custom_loss_function_path="test:loss")).custom_loss_function
        assert hook is not None
        with pytest.raises(HookError) as caught:
            hook(ARGS, None, {}, None, None)
    assert says in str(caught.value)


TIS = {
    "args": ARGS,
    "pg_loss": "loss",
    "train_log_probs": [],
    "rollout_log_probs": [],
    "loss_masks": [1],
    "total_lengths": [],
    "response_lengths": [],
    "parallel_state": "ps",
}


@pytest.mark.parametrize(
    ("name", "form", "metrics"),
    [
        ("tis", "parallel-state", {"parallel_state": "ps"}),
        ("tis_keywords", "parallel-state", {"keys": sorted({*TIS} - {"pg_loss", "loss_masks"})}),
        ("tis_without_state", "no-parallel-state", {}),
    ],
)
def test_tis(name: str, form: str, metrics: dict[str, Any]) -> None:
    hook = bound("custom_tis_function", f"training:{name}")
    assert hook(**TIS) == ("loss", [1], metrics)
    assert hook.form == form


def test_bad_returns_of_the_trainer() -> None:
    with pytest.raises(HookError, match=r"returned int 0, expected \(loss, metrics\)"):
        bound("custom_loss_function", "training:loss_scalar")(ARGS, None, {}, 0, None)
    with pytest.raises(HookError, match=r"returned 2 values, expected \(pg_loss, masks, metrics\)"):
        bound("custom_tis_function", "training:tis_pair")(**TIS)
    with pytest.raises(HookError, match="returned a float, expected a function"):
        bound("custom_pg_loss_reducer_function", "training:reducer_scalar")([], [], [], False)
    with pytest.raises(HookError, match="returned None, expected a model"):
        bound("custom_model_provider", "training:provider_nothing")(True, True)


def test_pg_reducer() -> None:
    reduce = bound("custom_pg_loss_reducer_function", "training:reducer")([3], [2], [], True)
    assert float(reduce(torch.tensor([1.0, 2.0]))) == pytest.approx(0.03)


def test_errors_of_the_reducer_itself_are_told() -> None:
    for reducer, says in (
        (lambda values: values, "returned a tensor of shape [2], expected a scalar tensor"),
        (lambda values: values / [], "TypeError: "),
    ):
        with function_registry.temporary("test:reducer", lambda *given, reducer=reducer: reducer):
            hook = bind(Namespace(custom_pg_loss_reducer_function_path="test:reducer")).custom_pg_loss_reducer_function
            assert hook is not None
            with pytest.raises(HookError) as caught:
                hook([3], [2], [], True)(torch.ones(2))
        assert says in str(caught.value)


def test_tis_with_an_unknown_argument() -> None:
    with pytest.raises(UsageError, match="weights"):
        bound("custom_tis_function", "training:tis_unknown")


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("provider", ("model", True, False)),
        ("provider_with_stage", ("model", True, False, 1)),
        ("provider_with_kwargs", {"pre_process": True, "post_process": False}),
    ],
)
def test_model_provider_gets_vp_stage_by_name(name: str, made: Any) -> None:
    assert bound("custom_model_provider", f"training:{name}")(True, False, vp_stage=1) == made


def test_megatron_hooks() -> None:
    cases: list[tuple[str, str, tuple[Any, ...], Any]] = [
        ("custom_megatron_init", "megatron_init", (ARGS,), "init"),
        ("custom_megatron_before_log_prob_hook", "before_log_prob", (ARGS, [], "ref_"), "ref_"),
        ("custom_megatron_before_train_step_hook", "before_train_step", (ARGS, 1, 2, [], None, None), (1, 2)),
        ("custom_megatron_post_save_hook", "post_save", (ARGS, 3, "ckpt", None), "ckpt"),
    ]
    for point, name, given, received in cases:
        hook = bound(point, f"training:{name}")
        seen(hook).clear()
        hook(*given)
        assert seen(hook) == [received]


def test_coroutines_where_the_core_cannot_await() -> None:
    with pytest.raises(UsageError, match="called synchronously"):
        bound("custom_megatron_init", "training:async_init")
    with pytest.raises(HookError, match="returned a coroutine"):
        bound("custom_megatron_init", "training:hidden_coroutine")(ARGS)


def test_middlewares() -> None:
    hooks = bound_hooks("miles_router_middleware", "training:Middleware", "training:Outer")
    first, second = hooks.miles_router_middleware
    made = second(first("app", router="router"), router="router")
    assert made.router == "router" and made.app.app == "app"
    assert set(hooks.sources()) == {"--miles-router-middleware-paths[0]", "--miles-router-middleware-paths[1]"}
    with pytest.raises(UsageError, match="unexpected keyword argument 'router'"):
        bound_hooks("miles_router_middleware", "training:WithoutRouter")


def test_plug_ins_of_built_in_generate_functions() -> None:
    given = {"base_url": "http://x", "prompt": "p", "request_kwargs": {}, "metadata": {"a": 1}}
    agent = bound("custom_agent_function", "training:agent")
    assert asyncio.run(agent.call_async(**given)) == "http://x"
    assert asyncio.run(bound("custom_agent_function", "training:agent_with_metadata").call_async(**given)) == {"a": 1}
    specs = bound("generate_tool_specs", "training:specs")
    assert specs() is specs.target
    for name, answer in (("execute", "add{}"), ("execute_in_thread", "0")):
        assert asyncio.run(bound("generate_execute_tool_function", f"training:{name}").call_async("add", {})) == answer
    with pytest.raises(HookError, match="returned int 3, expected text"):
        asyncio.run(bound("generate_execute_tool_function", "training:execute_number").call_async("add", {}))
    with pytest.raises(UsageError, match="name a value"):
        bound("generate_tool_specs", "training:agent")


def test_a_synchronous_plug_in_is_retried() -> None:
    attempts: list[int] = []

    def save(args: Namespace, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None) -> None:
        attempts.append(rollout_id)
        if len(attempts) < 3:
            raise OSError("bucket is busy")

    key = "custom-megatron-post-save-hook"
    with function_registry.temporary("test:save", save):
        hooks = bind(Namespace(custom_megatron_post_save_hook_path="test:save"), policies={key: "retry:2"})
    hook = hooks.custom_megatron_post_save_hook
    assert hook is not None
    hook(ARGS, 7, "ckpt", None)
    assert attempts == [7, 7, 7] and hook.stats.calls == 1 and hook.stats.failures == 0
