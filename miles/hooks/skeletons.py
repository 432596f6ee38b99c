"""The bodies of the plug-ins that `miles new` writes; signatures, docstrings and flags come from the catalogue.

`body` is indented source below the signature (for classes and values: the whole definition). `test` is the body of a
test that calls the plug-in through `hook`, its bound form.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skeleton:
    form: str
    body: str
    test: str
    # Source above the definition, and whether the definition is `body` as a whole.
    constants: str = ""
    whole: bool = False
    # Flags without which a run does not call it.
    flags: str = ""


_MULTI_TURN = (
    "--custom-generate-function-path miles.rollout.generate_hub.multi_turn.generate --generate-tool-call-parser hermes"
)
_AGENTIC = "--custom-generate-function-path miles.rollout.generate_hub.agentic_tool_call.generate --use-miles-router"

_SAMPLES = """\
samples = [Sample(index=i, response="4", tokens=[1, 2], response_length=1, reward=float(i)) for i in range(2)]
"""

_BUILT_IN_ROLLOUT = """\
from miles.rollout.sglang_rollout import generate_rollout

# The built-in rollout; change the groups before, or the output after it.
return generate_rollout(args, rollout_id, data_source, evaluation=evaluation)
"""

_ROLLOUT_TEST = """\
def built_in(args, rollout_id, data_source, evaluation):
    return rollout_id, data_source, evaluation

monkeypatch.setattr("miles.rollout.sglang_rollout.generate_rollout", built_in)
assert hook.target(Namespace(), 3, "prompts", evaluation=True) == (3, "prompts", True)
"""

SKELETONS: dict[str, Skeleton] = {
    "rollout_function": Skeleton("data-source", _BUILT_IN_ROLLOUT, _ROLLOUT_TEST),
    "eval_function": Skeleton("data-source", _BUILT_IN_ROLLOUT, _ROLLOUT_TEST),
    "custom_generate_function": Skeleton(
        "args-sample-params",
        """\
from miles.rollout.sglang_rollout import generate

# The built-in single turn; change the prompt before, or add turns after it.
return await generate(args, sample, sampling_params)
""",
        """\
async def generate(args, sample, sampling_params):
    sample.response = f"4 at {sampling_params['temperature']}"
    return sample

monkeypatch.setattr("miles.rollout.sglang_rollout.generate", generate)
given = GenerateFnInput(Namespace(args=Namespace()), Sample(prompt="2+2="), {"temperature": 1.0}, evaluation=False)
output = asyncio.run(hook.call_async(given))
assert output.samples.response == "4 at 1.0"
""",
    ),
    "custom_rm": Skeleton(
        "sample",
        "return float(sample.response.strip() == str(sample.label))\n",
        """\
right, wrong = Sample(response=" 4\\n", label="4"), Sample(response="5", label="4")
args = Namespace(reward_key=None)
assert asyncio.run(hook.call_async(args, right)) == 1.0
assert asyncio.run(hook.call_async(args, wrong)) == 0.0
""",
    ),
    "dynamic_sampling_filter": Skeleton(
        "published",
        """\
rewards = {sample.get_reward_value(args) for sample in samples}
return DynamicFilterOutput(keep=len(rewards) > 1, reason="same_reward")
""",
        _SAMPLES
        + """\
args = Namespace(reward_key=None)
assert hook(args, samples).keep
assert not hook(args, samples[:1]).keep
""",
    ),
    "buffer_filter": Skeleton(
        "live-buffer",
        """\
taken = buffer[:num_samples]
del buffer[:num_samples]
return taken
""",
        _SAMPLES
        + """\
buffer = [[samples[0]], [samples[1]]]
assert hook(Namespace(), None, buffer, 1) == [[samples[0]]]
assert buffer == [[samples[1]]]
""",
    ),
    "rollout_sample_filter": Skeleton(
        "groups",
        """\
for group in samples:
    for sample in group:
        if sample.status == Sample.Status.TRUNCATED:
            sample.remove_sample = True
""",
        _SAMPLES
        + """\
samples[0].status = Sample.Status.TRUNCATED
hook(Namespace(), [samples])
assert [s.remove_sample for s in samples] == [True, False]
""",
    ),
    "rollout_all_samples_process": Skeleton(
        "get-samples",
        """\
lengths = [sample.response_length for group in all_groups for sample in group]
print(f"{len(lengths)} samples, longest response {max(lengths, default=0)} tokens")
""",
        _SAMPLES + "hook(Namespace(), [samples], lambda n: [])\n",
    ),
    "rollout_data_postprocess": Skeleton(
        "rollout-id",
        """\
for mask in rollout_data["loss_masks"]:
    mask[-1] = 0  # the end-of-text token is not trained
""",
        """\
rollout_data = {"loss_masks": [[1, 1, 1]]}
hook(Namespace(), 0, rollout_data)
assert rollout_data["loss_masks"] == [[1, 1, 0]]
""",
    ),
    "custom_loss_function": Skeleton(
        "parallel-state",
        """\
# REINFORCE on one packed row: rewards times log-probabilities of the response tokens.
import torch

losses, end = [], 0
for tokens, total, response, advantage in zip(
    batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], batch["advantages"], strict=True
):
    end += total
    rows = logits[0, end - response - 1 : end - 1] / args.rollout_temperature
    log_probs = rows.log_softmax(-1).gather(-1, tokens[total - response :, None])[:, 0]
    losses.append(-advantage * log_probs)
loss = sum_of_sample_mean(torch.cat(losses))
return loss, {"pg_loss": loss.detach()}
""",
        """\
import torch

batch = {
    "unconcat_tokens": [torch.tensor([1, 2, 3])],
    "total_lengths": [3],
    "response_lengths": [2],
    "advantages": [torch.ones(2)],
}
logits = torch.zeros(1, 3, 5, requires_grad=True)
loss, metrics = hook(Namespace(rollout_temperature=1.0), None, batch, logits, torch.mean)
loss.backward()
assert logits.grad is not None and torch.isfinite(loss) and "pg_loss" in metrics
""",
        flags="--loss-type custom_loss",
    ),
    "custom_tis_function": Skeleton(
        "parallel-state",
        """\
import torch

weight = torch.exp(torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).clamp(max=2.0)
return pg_loss * weight, loss_masks, {"tis": weight}
""",
        """\
import torch

same = [torch.zeros(3)]
loss, masks, metrics = hook(
    args=Namespace(), pg_loss=torch.ones(3), train_log_probs=same, rollout_log_probs=same,
    loss_masks=[torch.ones(3)], total_lengths=[5], response_lengths=[3], parallel_state=None,
)
assert loss.tolist() == [1.0, 1.0, 1.0] and len(masks) == 1 and "tis" in metrics
""",
        flags="--use-tis",
    ),
    "custom_pg_loss_reducer_function": Skeleton(
        "published",
        """\
import torch

mask = torch.cat([m.flatten() for m in loss_masks])
return lambda pg_loss: (pg_loss * mask).sum() / MAX_LENGTH
""",
        """\
import torch

reducer = hook([5], [2], [torch.tensor([1.0, 0.0])], False)
assert float(reducer(torch.tensor([1024.0, 7.0]))) == 1.0
""",
        constants="MAX_LENGTH = 1024  # a constant in the place of each response's length, as in Dr.GRPO\n",
    ),
    "custom_reward_post_process": Skeleton(
        "published",
        """\
raw_rewards = [sample.get_reward_value(args) for sample in samples]
mean = sum(raw_rewards) / max(len(raw_rewards), 1)
return raw_rewards, [reward - mean for reward in raw_rewards]
""",
        _SAMPLES + "assert hook(Namespace(reward_key=None), samples) == ([0.0, 1.0], [-0.5, 0.5])\n",
    ),
    "custom_convert_samples_to_train_data": Skeleton(
        "published",
        """\
rewards = [sample.get_reward_value(args) for sample in samples]
return {
    "tokens": [sample.tokens for sample in samples],
    "response_lengths": [sample.response_length for sample in samples],
    "rewards": rewards,
    "raw_reward": rewards,
    "truncated": [int(sample.status == Sample.Status.TRUNCATED) for sample in samples],
    "sample_indices": [sample.index for sample in samples],
    "loss_masks": [
        [0] * sample.response_length
        if sample.remove_sample
        else sample.loss_mask or [1] * sample.response_length
        for sample in samples
    ],
}
""",
        _SAMPLES
        + """\
data = hook(Namespace(reward_key=None), samples)
assert data["rewards"] == [0.0, 1.0] and data["loss_masks"] == [[1], [1]]
""",
    ),
    "custom_rollout_log_function": Skeleton(
        "published",
        """\
print(f"rollout {rollout_id}: {len(samples)} samples in {rollout_time:.1f} s")
return False  # the default logging runs as well
""",
        _SAMPLES + "assert hook(0, Namespace(), samples, None, 1.0) is False\n",
    ),
    "custom_eval_rollout_log_function": Skeleton(
        "published",
        """\
for name, entry in data.items():
    print(f"rollout {rollout_id}: {name} {sum(entry['rewards']) / len(entry['rewards']):.3f}")
return False  # the default logging runs as well
""",
        'assert hook(0, Namespace(), {"carry": {"rewards": [1.0, 0.0]}}, None) is False\n',
    ),
    "data_source": Skeleton(
        "class",
        '''\
class MyDataSource:
    """Sums of two numbers, as many as are asked for."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.next_group = 0
        self.returned: list[list[Sample]] = []

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        taken, self.returned = self.returned[:num_samples], self.returned[num_samples:]
        return taken + [self._group() for _ in range(num_samples - len(taken))]

    def _group(self) -> list[Sample]:
        number, size = self.next_group, self.args.n_samples_per_prompt
        self.next_group += 1
        return [
            Sample(group_index=number, index=number * size + i, prompt=f"{number}+1=", label=str(number + 1))
            for i in range(size)
        ]

    def add_samples(self, samples: list[list[Sample]]) -> None:
        self.returned += samples

    def save(self, rollout_id: int) -> None:
        """Where the plug-in state is saved (`state_dict`), nothing is left to do here."""

    def load(self, rollout_id: int | None = None) -> None:
        """See `save`."""

    def state_dict(self) -> dict[str, int]:
        return {"next_group": self.next_group}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_group = state["next_group"]
''',
        """\
source = hook(Namespace(n_samples_per_prompt=2))
groups = source.get_samples(3)
assert [len(g) for g in groups] == [2, 2, 2] and groups[2][1].index == 5
source.add_samples(groups[:1])
assert source.get_samples(1) == groups[:1]
""",
        whole=True,
    ),
    "custom_megatron_init": Skeleton("published", 'print("the trainer is initialised")\n', "hook(Namespace())\n"),
    "custom_megatron_before_log_prob_hook": Skeleton(
        "published",
        "print(f\"log-probs of the {store_prefix or 'actor'} pass, {len(model)} model chunks\")\n",
        'hook(Namespace(), [], "ref_")\n',
    ),
    "custom_megatron_before_train_step_hook": Skeleton(
        "published",
        'print(f"rollout {rollout_id}, step {step_id}")\n',
        "hook(Namespace(), 0, 0, [], None, None)\n",
    ),
    "custom_megatron_post_save_hook": Skeleton(
        "published",
        'print(f"saved rollout {rollout_id} in {checkpoint_dir}")\n',
        'hook(Namespace(), 0, "ckpt", None)\n',
    ),
    "custom_model_provider": Skeleton(
        "published",
        '''\
def my_model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> GPTModel:
    """The model that the run would have without this, with embeddings that are not trained.

    Called once per model chunk of each trainer process, by keyword. Returns a module that behaves like Megatron-Core's
    GPTModel and has the parameters of --hf-checkpoint.
    """
    from megatron.training import get_args

    from miles.backends.megatron_utils.model_provider import get_model_provider_func

    model = get_model_provider_func(get_args())(pre_process, post_process, vp_stage)
    if pre_process:
        model.embedding.requires_grad_(False)
    return model
''',
        """\
import torch

class Model(torch.nn.Module):
    embedding = torch.nn.Embedding(2, 2)

model = Model()
monkeypatch.setattr("megatron.training.get_args", lambda: Namespace())
monkeypatch.setattr(
    "miles.backends.megatron_utils.model_provider.get_model_provider_func", lambda args: lambda *stage: model
)
assert hook(True, False) is model and not model.embedding.weight.requires_grad
""",
        whole=True,
        flags="--train-backend megatron",
    ),
    "miles_router_middleware": Skeleton(
        "class",
        '''\
class MyMiddleware:
    """Counts the requests that pass."""

    def __init__(self, app: ASGIApp, *, router: MilesRouter) -> None:
        self.app, self.router = app, router
        self.requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.requests += 1
        await self.app(scope, receive, send)
''',
        """\
async def app(scope, receive, send):
    pass

middleware = hook(app, router=None)
asyncio.run(middleware({"type": "http"}, None, None))
assert middleware.requests == 1
""",
        whole=True,
        flags="--use-miles-router",
    ),
    "custom_agent_function": Skeleton(
        "published",
        """\
import httpx

messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
async with httpx.AsyncClient(timeout=None) as client:
    payload = {"model": "default", "messages": messages, **request_kwargs}
    response = await client.post(f"{base_url}/v1/chat/completions", json=payload)
    response.raise_for_status()
""",
        """\
import httpx

seen = []

def answer(request: httpx.Request) -> httpx.Response:
    seen.append(str(request.url))
    return httpx.Response(200, json={})

client = httpx.AsyncClient
monkeypatch.setattr(httpx, "AsyncClient", lambda **given: client(transport=httpx.MockTransport(answer), **given))
asyncio.run(hook.call_async(base_url="http://here", prompt="2+2=", request_kwargs={}))
assert seen == ["http://here/v1/chat/completions"]
""",
        flags=_AGENTIC,
    ),
    "generate_tool_specs": Skeleton(
        "list",
        """\
my_tool_specs: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]
""",
        'assert hook()[0]["function"]["name"] == "add"\n',
        whole=True,
    ),
    "generate_execute_tool_function": Skeleton(
        "published",
        """\
if name == "add":
    return str(params["a"] + params["b"])
return f"unknown tool {name}"
""",
        'assert asyncio.run(hook.call_async("add", {"a": 1, "b": 2})) == "3"\n',
        flags=_MULTI_TURN,
    ),
}
