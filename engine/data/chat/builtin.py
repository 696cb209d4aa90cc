"""Built-in chat templates, for base models that come without one.

Each follows the format of the model family it is named after, with `{% generation %}` around assistant turns. `llama2`
and `mistral` need no special token except the end of text, so they work with every tokenizer. Alternative considered:
adding tokens to the vocabulary, which resizes embeddings and takes more data to learn than most fine-tuning datasets
have.
"""

from typing import NamedTuple


class BuiltinTemplate(NamedTuple):
    """A Jinja source and the special tokens it needs in addition to `bos_token` and `eos_token`."""

    source: str
    needs: tuple[str, ...]


_NO_TOOLS = """\
{%- if tools %}{{ raise_exception('this template has no place for tools') }}{% endif %}
"""

_CHATML = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)

_LLAMA3 = (
    _NO_TOOLS
    + """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
)

_TURNS_MUST_ALTERNATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('after a system message at most, roles must alternate user/assistant/user/assistant ...') }}
    {%- endif %}
"""

_LLAMA2 = (
    _NO_TOOLS
    + _TURNS_MUST_ALTERNATE
    + """\
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- ' ' + message['content'] | trim + ' ' + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- bos_token }}{{- '[INST] ' }}
        {%- if loop.first and system is defined %}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif %}
        {{- message['content'] | trim + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""
)

_MISTRAL = (
    _NO_TOOLS
    + "{{- bos_token }}\n"
    + _TURNS_MUST_ALTERNATE
    + """\
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- '[INST] ' }}
        {%- if loop.first and system is defined %}{{- system + '\\n\\n' }}{%- endif %}
        {{- message['content'] + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""
)

BUILTIN = {
    "chatml": BuiltinTemplate(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama2": BuiltinTemplate(_LLAMA2, ()),
    "llama3": BuiltinTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": BuiltinTemplate(_MISTRAL, ()),
}
