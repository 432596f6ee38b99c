"""Chat templates in the manner of the common families, each with a tokenizer of one token per byte."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|header|>", "<|endoftext|>"]

# A line break between turns, tool calls in tags, tool answers in the user's name.
CHATML = """\
{%- if tools -%}<|im_start|>system
{{ tools | map(attribute='function.name') | join(' ') }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% else -%}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

# As Qwen3: answers before the last question of the user lose what they have thought.
THINKING = """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.index0 < last.user -%}
{{ message.content.split('</think>')[-1].lstrip() }}
{%- else -%}
{{ message.content }}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}<think></think>{%- endif -%}
{%- endif -%}
"""

# As Llama 3: nothing between turns, contents are stripped, an answer that calls a tool has no other content.
HEADERS = """\
{%- for message in messages -%}<|header|>{{ message.role }}<|header|>
{% if message.tool_calls -%}
{%- set call = message.tool_calls[-1].function -%}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{%- else -%}
{{ message.content | trim }}
{%- endif -%}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|header|>assistant<|header|>
{% endif -%}
"""

# No control token ends a turn.
PLAIN = """\
{%- for message in messages -%}{{ message.role }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt -%}assistant: {% endif -%}
"""


def byte_tokenizer(template: str, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    vocab = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token=eos, chat_template=template)
