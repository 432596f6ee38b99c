from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.quickstart import make_tokenizer
from miles.errors import FlagError, UsageError
from miles.rollout.loss_mask import MultiTurnLossMaskGenerator, get_response_lengths

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% if tools %}<tools>{{ tools | length }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops the reasoning of every assistant message but the last, as reasoning models do.
FORGETS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)

CONVERSATION = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def characters(template: str, *added: str) -> PreTrainedTokenizerFast:
    """One token per character, and whole tokens for the markers of chat templates."""
    vocab = {chr(i): i for i in range(32, 127)} | {"\n": 10, "<unk>": 0}
    vocab |= {token: 200 + i for i, token in enumerate(added)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=template)


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    return characters(template, "<|im_start|>", "<|im_end|>")


def split(tokenizer: PreTrainedTokenizerFast, kind: str, messages: list[dict[str, Any]], **kwargs: Any) -> list[str]:
    """The text in runs, the learned ones in brackets."""
    generator = MultiTurnLossMaskGenerator(tokenizer, kind)
    ids, mask = generator.get_loss_mask(messages, **kwargs)
    assert len(ids) == len(mask)
    pieces: list[str] = []
    previous = None
    for token, learned in zip(ids, mask, strict=True):
        text = tokenizer.convert_ids_to_tokens(token)
        if learned == previous:
            pieces[-1] += text
        else:
            pieces.append(text)
        previous = learned
    return [f"[{p}]" if (i % 2 == 0) == (mask[0] == 1) else p for i, p in enumerate(pieces)]


HEAD = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
MIDDLE = "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["qwen", "qwen3", "template"])
def test_what_the_assistant_says_is_learned(kind: str) -> None:
    got = split(chatml(), kind, CONVERSATION)
    assert got == [HEAD, "[two<|im_end|>\n]", MIDDLE, "[four<|im_end|>\n]"]


@pytest.mark.parametrize("kind", ["qwen", "qwen3", "template"])
def test_token_ids_are_those_of_the_whole_conversation(kind: str) -> None:
    tokenizer = chatml()
    ids, _ = MultiTurnLossMaskGenerator(tokenizer, kind).get_loss_mask(CONVERSATION)
    assert ids == tokenizer(tokenizer.apply_chat_template(CONVERSATION, tokenize=False))["input_ids"]


@pytest.mark.parametrize("kind", ["qwen", "qwen3", "template"])
def test_step_loss_mask_silences_a_message(kind: str) -> None:
    messages = [CONVERSATION[0], {**CONVERSATION[1], "step_loss_mask": 0}, *CONVERSATION[2:]]
    got = split(chatml(), kind, messages)
    assert got == [HEAD + "two<|im_end|>\n" + MIDDLE, "[four<|im_end|>\n]"]


@pytest.mark.parametrize("kind", ["qwen", "qwen3", "template"])
def test_tools_are_rendered_once(kind: str) -> None:
    got = split(chatml(), kind, CONVERSATION, tools=[{"name": "f"}, {"name": "g"}])
    assert "".join(got).count("<tools>2</tools>") == 1


@pytest.mark.parametrize("kind", ["qwen", "qwen3", "template"])
def test_a_system_message_of_its_own(kind: str) -> None:
    got = split(chatml(), kind, [{"role": "system", "content": "Be brief."}, *CONVERSATION[:2]])
    assert got == [HEAD.replace("You help.", "Be brief."), "[two<|im_end|>\n]"]


def test_distill_qwen_learns_the_last_message_as_it_stands() -> None:
    tokenizer = characters(DEEPSEEK, "<｜User｜>", "<｜Assistant｜>", "<eos>")
    expected = ["<｜User｜>one<｜Assistant｜>", "[two]"]
    assert split(tokenizer, "distill_qwen", CONVERSATION[:2]) == expected
    assert split(tokenizer, "qwen", CONVERSATION[:2]) == expected, "the DeepSeek marker switches qwen to distill_qwen"
    silent = [CONVERSATION[0], {**CONVERSATION[1], "step_loss_mask": 0}]
    assert split(tokenizer, "distill_qwen", silent) == ["<｜User｜>one<｜Assistant｜>two"]


# ---- template ----------------------------------------------------------------------------------------------------


def test_generation_blocks_decide_where_there_are_any() -> None:
    tokenizer = characters(MARKED, "<eos>")
    assert split(tokenizer, "template", CONVERSATION) == [
        "[user]one[assistant]", "[two<eos>]", "[user]three[assistant]", "[four<eos>]",
    ]  # fmt: skip
    messages = [CONVERSATION[0], {**CONVERSATION[1], "step_loss_mask": 0}, *CONVERSATION[2:]]
    assert split(tokenizer, "template", messages) == [
        "[user]one[assistant]two<eos>[user]three[assistant]",
        "[four<eos>]",
    ]


def test_step_loss_mask_needs_one_block_per_message() -> None:
    once = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}end{% endgeneration %}"
    messages = [CONVERSATION[0], {**CONVERSATION[1], "step_loss_mask": 0}, *CONVERSATION[2:]]
    with pytest.raises(UsageError, match=r"made 1 of 2 messages"):
        split(characters(once), "template", messages)


def test_the_generation_prompt_is_given_not_learned() -> None:
    tokenizer = chatml(FORGETS_REASONING)
    with_reasoning = [CONVERSATION[0], {"role": "assistant", "content": "<think>hm</think>two"}]
    assert split(tokenizer, "template", with_reasoning) == [
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>", "[hm</think>two<|im_end|>\n]",
    ]  # fmt: skip
    assert split(tokenizer, "template", CONVERSATION[:2])[1] == "[two<|im_end|>\n]"


def test_a_template_that_rewrites_history_is_refused() -> None:
    messages = [CONVERSATION[0], {"role": "assistant", "content": "<think>hm</think>two"}, *CONVERSATION[2:]]
    with pytest.raises(UsageError, match=r"--loss-mask-type template: .* message 1 \(assistant\) differently"):
        split(chatml(FORGETS_REASONING), "template", messages)


def test_an_assistant_that_speaks_first() -> None:
    tokenizer = characters("{% for m in messages %}{{ m['content'] }};{% endfor %}")
    assert split(tokenizer, "template", [{"role": "assistant", "content": "hi"}, CONVERSATION[0]]) == ["[hi;]", "one;"]


def test_the_example_of_the_docstring() -> None:
    generator = MultiTurnLossMaskGenerator(make_tokenizer.tokenizer(), "template")
    messages = [{"role": "user", "content": "9+7=?"}, {"role": "assistant", "content": "16"}]
    assert generator.get_loss_mask(messages) == ([14, 15, 12, 19, 20, 6, 11, 1], [0, 0, 0, 0, 0, 1, 1, 1])


# ---- the rest of the published class -----------------------------------------------------------------------------


def test_unknown_types_are_refused() -> None:
    with pytest.raises(FlagError, match=r"--loss-mask-type: expected one of template, qwen, qwen3, distill_qwen"):
        MultiTurnLossMaskGenerator(chatml(), "llama")


def test_qwen_refuses_templates_that_do_not_show_messages() -> None:
    with pytest.raises(UsageError, match="does not show two user messages as they are"):
        split(chatml("{{ messages[-1]['content'] }}"), "qwen", CONVERSATION)


def test_lengths_of_the_template_s_additions() -> None:
    generator = MultiTurnLossMaskGenerator(chatml(), "qwen")
    system = len("<>system\nYou help.<>\n") - 2  # each marker is one token
    assert generator.get_system_message_length() == (system, len("<assistant\n"))
    assert (generator.system_message_length, generator.gen_token_length) == (system, len("<assistant\n"))


@pytest.mark.parametrize(("masks", "lengths"), [([], []), ([[0, 0, 1, 0, 1]], [3]), ([[0, 0], [1], []], [0, 1, 0])])
def test_response_lengths_begin_at_the_first_learned_token(masks: list[list[int]], lengths: list[int]) -> None:
    assert get_response_lengths(masks) == lengths


def test_text_of_a_mask() -> None:
    tokenizer = make_tokenizer.tokenizer()
    generator = MultiTurnLossMaskGenerator(tokenizer, "template")
    ids = tokenizer.encode("1+2=3?4")
    assert generator.get_text_from_loss_mask(ids, [0, 0, 1, 1, 0, 1, 1]) == ["2=", "?4"]


def test_media_shift_the_mask_to_the_right() -> None:
    tokenizer = make_tokenizer.tokenizer()
    generator = MultiTurnLossMaskGenerator(tokenizer, "template")
    content = [{"type": "image", "image": "x"}, {"type": "text", "text": "1"}, {"type": "text", "text": "2"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "3"}]
    ids, mask = generator.get_loss_mask_with_multimodal_alignment(messages, list(range(8)))
    assert (ids, mask) == (list(range(8)), [0, 0, 0, 0, 0, 0, 1, 1])
    with pytest.raises(AssertionError, match="3 input_ids, but the text alone has 5 tokens"):
        generator.get_loss_mask_with_multimodal_alignment(messages, [1, 2, 3])
