"""The tokenizer of the tiny tool model: one token per byte, one per tag, one per role.

`tokenizer()` builds it in memory, `save(folder)` writes it as a Hugging Face tokenizer folder. Encoding and decoding
are exact inverses on any text in UTF-8.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.base_models import save_tokenizer

CONTROL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
# Text of its own, not control: it must survive decoding with skip_special_tokens.
TAG_NAMES = ["think", "search", "information", "answer", "tool_call"]
TAGS = [tag for name in TAG_NAMES for tag in (f"<{name}>", f"</{name}>")]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = [*CONTROL_TOKENS, *TAGS, *BYTES]
MAX_LENGTH = 512  # tokens of a whole conversation

# `<|user|>7*8=?<|end|><|assistant|>`, before it `<|system|>python(code)<|end|>` where tools are given. What the
# assistant says ends with <|end|> and is what is learned, except what a search engine put between <information> tags.
CHAT_TEMPLATE = """\
{%- if tools -%}
<|system|>
{%- for tool in tools -%}
{{ tool.function.name }}({{ tool.function.parameters.properties.keys() | join(', ') }})
{%- if not loop.last %} {% endif -%}
{%- endfor -%}
<|end|>
{%- endif -%}
{%- for message in messages -%}
{{ '<|' + message.role + '|>' }}
{%- if message.role == 'assistant' -%}
{%- for part in (message.content or '').split('<information>') -%}
{%- if not loop.first -%}
{{ '<information>' + part.split('</information>')[0] + '</information>' }}
{%- endif -%}
{%- generation -%}
{{ part.split('</information>')[-1] }}
{%- if loop.last -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{{ '<tool_call>{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}</tool_call>' }}
{%- endfor -%}
{{ '<|end|>' }}
{%- endif -%}
{%- endgeneration -%}
{%- endfor -%}
{%- else -%}
{{ message.content + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Example: `tokenizer().decode(tokenizer().encode("<answer>56</answer><|end|>"))` is the text itself, 5 tokens."""
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCAB)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )


def save(folder: Path) -> None:
    """Write the tokenizer's files to `folder`."""
    save_tokenizer(tokenizer(), folder)
