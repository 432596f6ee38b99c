"""For tests of conversations: a ChatML tokenizer of one token per byte, and an engine that says what it is told to."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from miles.config import parse
from miles.hooks import bind
from miles.rollout import context
from miles.rollout.state import GenerateState
from miles.types import Sample

CONTROL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
# As ChatML has it: a line break between the end of a turn and the next message, tool answers in the user's name.
TEMPLATE = """\
{%- if tools -%}<|im_start|>system
{{ tools | map(attribute='function.name') | join(' ') }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% else -%}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    vocab = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=template
    )


class TalkingEngine:
    """Answers requests with `says` in order; an entry is the text, or (text, finish reason)."""

    base_url = "talking"

    def __init__(self, tokenizer: Any, says: Sequence[str | tuple[str, str]]) -> None:
        self.tokenizer, self.says = tokenizer, list(says)
        self.requests: list[dict[str, Any]] = []
        self.abort_all_called = False

    async def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(payload)
        said = self.says.pop(0)
        text, finish = (said, "stop") if isinstance(said, str) else said
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        meta = {
            "finish_reason": {"type": finish},
            "weight_version": str(len(self.requests)),
            "output_token_logprobs": [[-0.25, token, None] for token in ids],
            "prompt_tokens": len(payload["input_ids"]),
        }
        await asyncio.sleep(0)
        return {"text": text, "meta_info": meta}

    async def abort_all(self) -> None:
        self.abort_all_called = True

    def prompts(self) -> list[str]:
        return [self.tokenizer.decode(payload["input_ids"]) for payload in self.requests]


BASE_FLAGS = (
    "--hf-checkpoint", "m", "--prompt-data", "p", "--num-rollout", "1", "--rollout-batch-size", "2",
    "--num-steps-per-rollout", "1",
)  # fmt: skip


def state_of(engine: Any, *flags: str, tokenizer: Any = None, policies: dict[str, str] | None = None) -> GenerateState:
    """A GenerateState under these flags. Call it inside the event loop; `forget` ends it."""
    _, args = parse([*BASE_FLAGS, *flags])
    hooks = bind(args, policies=policies, error_budget=1.0)
    context.install(context.RunContext(hooks, engine))
    state = GenerateState(args)
    if tokenizer is not None:
        state.__dict__["tokenizer"], state.__dict__["processor"] = tokenizer, None
    return state


def fresh(prompt: Any = "hi", **fields: Any) -> Sample:
    return Sample(**{"group_index": 0, "index": 0, "prompt": prompt, **fields})


def args_of(state: GenerateState) -> Namespace:
    return state.args
