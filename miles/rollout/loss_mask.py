"""Which tokens of a conversation are learned: token ids and a 0/1 mask of the same length.

    template       any chat template. Spans of `{% generation %}` blocks where the template has them, else what the
                   template adds for each assistant message; the masked text is checked against the whole rendering
    qwen, qwen3    the published schemes: every message is rendered alone and stripped of what surrounds it
    distill_qwen   one turn: the first message is the prompt, the content of the last one is learned

A message with `step_loss_mask` other than 1 is not learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from miles.errors import FlagError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Masked = tuple[list[int], list[int]]
Span = tuple[int, int]  # characters [start, end) of a rendered conversation

FLAG = "--loss-mask-type"
DEEPSEEK_ASSISTANT = "<｜Assistant｜>"
PROBE = "FOR TESTING ONLY"
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def get_response_lengths(loss_masks: list[list[int]]) -> list[int]:
    """Per mask the number of positions from its first 1 to its end. Example: `[[0, 1, 0], [0]]` gives `[2, 0]`."""
    return [len(mask) - mask.index(1) if 1 in mask else 0 for mask in loss_masks]


class MultiTurnLossMaskGenerator:
    """Loss masks of conversations under one scheme.

    Example: `MultiTurnLossMaskGenerator(tokenizer, "template").get_loss_mask([{"role": "user", "content": "9+7=?"},
    {"role": "assistant", "content": "16"}])` is `([14, 15, 12, 19, 20, 6, 11, 1], [0, 0, 0, 0, 0, 1, 1, 1])`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokenizer_type: str = "qwen") -> None:
        self.tokenizer = tokenizer
        self.tokenizer_type = tokenizer_type
        schemes = {
            "template": self.gen_multi_turn_loss_mask_template,
            "qwen": self.gen_multi_turn_loss_mask_qwen,
            "qwen3": self.gen_multi_turn_loss_mask_qwen3,
            "distill_qwen": self.gen_multi_turn_loss_mask_distill_qwen,
        }
        if tokenizer_type not in schemes:
            raise FlagError(FLAG, given=tokenizer_type, expected=f"one of {', '.join(schemes)}")
        if tokenizer_type == "qwen" and DEEPSEEK_ASSISTANT in tokenizer.get_added_vocab():
            tokenizer_type = "distill_qwen"
        self._scheme = schemes[tokenizer_type]

    def get_loss_mask(self, messages: Messages, tools: Tools = None) -> Masked:
        """`(token_ids, mask)`, equally long. Raises UsageError where the scheme does not fit the chat template."""
        return self._scheme(messages, tools)

    def get_loss_mask_with_multimodal_alignment(
        self, messages: Messages, input_ids: list[int], tools: Tools = None
    ) -> Masked:
        """`input_ids` with the mask of the text alone, shifted right by as many tokens as the media add."""
        _, mask = self.get_loss_mask([_text_only(message) for message in messages], tools)
        extra = len(input_ids) - len(mask)
        assert extra >= 0, f"{len(input_ids)} input_ids, but the text alone has {len(mask)} tokens"
        return input_ids, [0] * extra + mask

    def get_response_lengths(self, loss_masks: list[list[int]]) -> list[int]:
        return get_response_lengths(loss_masks)

    def get_text_from_loss_mask(self, token_ids: list[int], loss_masks: list[int]) -> list[str]:
        """The learned text, one entry per run of 1s."""
        runs = groupby(zip(token_ids, loss_masks, strict=True), key=lambda pair: pair[1])
        return [self.tokenizer.decode([token for token, _ in run]) for kept, run in runs if kept == 1]

    # ---- any template ----------------------------------------------------------------------------------------

    def gen_multi_turn_loss_mask_template(self, messages: Messages, tools: Tools = None) -> Masked:
        """Spans of the rendered text, mapped to tokens: a token is learned if it lies within a span."""
        if not self.tokenizer.is_fast:
            raise FlagError(
                FLAG, given="the type template needs a fast tokenizer (tokenizer.json) for character offsets."
            )
        template = self.tokenizer.get_chat_template(tools=tools)
        find = self._marked_spans if _GENERATION_BLOCK.search(template) else self._added_spans
        text, spans = find(messages, tools)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [int(any(a <= start < end <= b for a, b in spans)) for start, end in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), mask

    def _marked_spans(self, messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, blocks = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        spans: list[Span] = [(start, end) for start, end in blocks[0]]
        skipped = [m for m in messages if not _learned(m)]
        if not skipped:
            return rendered[0], spans
        assistants = [m for m in messages if m["role"] == "assistant"]
        if len(spans) != len(assistants):
            raise UsageError(
                f"{FLAG} template: step_loss_mask needs one generation block per assistant message; the chat template "
                f"made {len(spans)} of {len(assistants)} messages."
            )
        return rendered[0], [span for span, m in zip(spans, assistants, strict=True) if _learned(m)]

    def _added_spans(self, messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        """Render up to each assistant message, without it and with it: the difference is its span.

        What the generation prompt already holds ("<|im_start|>assistant") is given, not learned.
        """
        whole = self._render(messages, tools)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not _learned(message):
                continue
            before = self._render(messages[:i], tools) if i else ""
            prompt = self._render(messages[:i], tools, add_generation_prompt=True) if i else ""
            through = self._render(messages[: i + 1], tools)
            if not whole.startswith(through) or not through.startswith(before):
                raise UsageError(
                    f"{FLAG} template: the chat template renders message {i} ({message['role']}) differently once "
                    "other messages follow it, so its tokens cannot be told apart. Put {% generation %} … "
                    "{% endgeneration %} around assistant content in the template, or split the conversation."
                )
            # Never less than `before`, which both begin with.
            spans.append((_common_prefix_length(prompt, through), len(through)))
        return whole, spans

    # ---- the published schemes -------------------------------------------------------------------------------

    def gen_multi_turn_loss_mask_qwen(self, messages: Messages, tools: Tools = None) -> Masked:
        """Each message rendered alone; the default system prompt that the template then adds is cut off."""

        def pieces() -> Iterator[list[int]]:
            for i, message in enumerate(messages):
                ids = self._ids([message], tools if i == 0 else None)
                yield ids[self.system_message_length :] if i > 0 and message["role"] != "system" else ids

        return self._joined(messages, pieces())

    def gen_multi_turn_loss_mask_qwen3(self, messages: Messages, tools: Tools = None) -> Masked:
        """Each message rendered beside a fixed user message, which keeps the reasoning of earlier turns in place."""
        neighbour = {"role": "user", "content": "FOR CALCULATING LOSS MASK ONLY"}
        length_alone = len(self._ids([neighbour]))
        length_behind = length_alone - self.system_message_length

        def pieces() -> Iterator[list[int]]:
            for i, message in enumerate(messages):
                if i == 0:
                    yield self._ids([message, neighbour], tools)[:-length_behind]
                else:
                    yield self._ids([neighbour, message])[length_alone:]

        return self._joined(messages, pieces())

    def gen_multi_turn_loss_mask_distill_qwen(self, messages: Messages, tools: Tools = None) -> Masked:
        """The first message with a generation prompt, then the raw content of the last one."""
        prompt = self._plain_ids(self._render(messages[:1], tools, add_generation_prompt=True))
        response = self._plain_ids(messages[-1]["content"])
        return prompt + response, [0] * len(prompt) + [_step(messages[-1])] * len(response)

    def _joined(self, messages: Messages, pieces: Iterator[list[int]]) -> Masked:
        token_ids: list[int] = []
        mask: list[int] = []
        for message, ids in zip(messages, pieces, strict=True):
            given = self.gen_token_length if _learned(message) and message["role"] == "assistant" else len(ids)
            token_ids += ids
            mask += [0] * min(given, len(ids)) + [1] * (len(ids) - given)
        return token_ids, mask

    @property
    def system_message_length(self) -> int:
        """Tokens of the system prompt that the template puts before a conversation without one."""
        return self._probe[0]

    @property
    def gen_token_length(self) -> int:
        """Tokens of the generation prompt ("<|im_start|>assistant")."""
        return self._probe[1]

    def get_system_message_length(self) -> tuple[int, int]:
        return self._probe

    @cached_property
    def _probe(self) -> tuple[int, int]:
        """Measured on two equal user messages: whatever precedes only the first one is the system prompt."""
        messages = [{"role": "user", "content": PROBE}] * 2
        text = self._render(messages, None)
        probe, whole = self._plain_ids(PROBE), self._plain_ids(text)
        places = self.find_all_sublist_indices(whole, probe)
        if len(places) != 2:
            raise UsageError(
                f"{FLAG} {self.tokenizer_type}: the chat template does not show two user messages as they are, which "
                "this type relies on. Use --loss-mask-type template."
            )
        first, second = places
        after = len(whole) - second - len(probe)
        header = second - first - len(probe) - after
        prompt = self._plain_ids(self._render(messages, None, add_generation_prompt=True))
        return first - header, len(prompt) - len(whole)

    def find_all_sublist_indices(self, main_list: list[int], sublist: list[int]) -> list[int]:
        """Every start of `sublist` in `main_list`."""
        n = len(sublist)
        return [i for i in range(len(main_list) - n + 1) if main_list[i : i + n] == sublist]

    # ---- the tokenizer ---------------------------------------------------------------------------------------

    def _render(self, messages: Messages, tools: Tools, *, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _ids(self, messages: Messages, tools: Tools = None) -> list[int]:
        return self._plain_ids(self._render(messages, tools))

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_prefix_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _step(message: dict[str, Any]) -> int:
    return int(_learned(message))


def _learned(message: dict[str, Any]) -> bool:
    return message.get("step_loss_mask", 1) == 1


def _text_only(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": " ".join(part["text"] for part in content if part.get("type") == "text")}
