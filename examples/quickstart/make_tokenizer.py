"""The quickstart's tokenizer: 53 tokens, one per character, `<think>` and `</think>` whole.

`tokenizer()` builds it in memory, `save(folder)` writes it as a Hugging Face tokenizer folder. Encoding and decoding
are exact inverses on texts made of its characters; any other character becomes `<unk>`.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.base_models import save_tokenizer

CONTROL_TOKENS = ["<pad>", "<eos>", "<unk>"]
# Text of its own, not control: it must survive decoding with skip_special_tokens.
THINK_TOKENS = ["<think>", "</think>"]
CHARACTERS = "0123456789+-*/=?;:,.! abcdefghijklmnopqrstuvwxyz"
VOCAB = [*CONTROL_TOKENS, *THINK_TOKENS, *CHARACTERS]
MAX_LENGTH = 128  # tokens of prompt and answer together

# The prompt is the user's text as it stands; what the assistant says ends with <eos> and is what is learned.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Example: `tokenizer().encode("9+7=?")` is `[14, 15, 12, 19, 20]`."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCAB)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )


def save(folder: Path) -> None:
    """Write the tokenizer's files to `folder`."""
    save_tokenizer(tokenizer(), folder)
