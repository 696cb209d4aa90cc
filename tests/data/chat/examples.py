"""Conversations and templates for tests of chat."""

import random

from engine.data.chat.builtin import BUILTIN
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.find import find_template
from engine.data.chat.template import ChatTemplate

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip


def encoder(tokenizer, source):
    known = find_template(tokenizer, "mistral")
    return ChatEncoder(tokenizer, ChatTemplate("test", source, known.special_tokens_map, known.special))


def conversation(*contents, system=None):
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def targets(template, messages, train_on="assistant"):
    rendered = template.render(messages, train_on)
    return [rendered.text[start:end] for start, end in rendered.targets]


def random_conversations(count, *, tools=False):
    rng = random.Random(0)
    parts = [
        "Hello",
        " world",
        "naïve ",
        "中文",
        "👩‍👩‍👧",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "def f(x):\n    return x\n",
        "é",
        "e\u0301",
    ]
    parts += [
        "",
        "<b>",
        "{{ x }}",
        "```py\nprint(1)\n```",
        "<|im_end|>",
        "</s>",
        "\u2581",
        "🎉",
        "1234",
        "&amp;",
        "'\"",
    ]

    def text():
        return "".join(rng.choices(parts, k=rng.choice((0, 1, 3, 10, 40))))

    for _ in range(count):
        system = [{"role": "system", "content": rng.choice(("", text()))}] * rng.randint(0, 1)
        turns = []
        for _ in range(rng.randint(1, 4)):
            turns.append({"role": "user", "content": text()})
            if tools and rng.random() < 0.3:
                call = {"type": "function", "function": {"name": "look_up", "arguments": {"q": text(), "n": [1, None]}}}
                turns.append({"role": "assistant", "content": rng.choice((None, text())), "tool_calls": [call]})
                turns += [{"role": "tool", "content": text()}] * rng.randint(1, 2)
            turns.append({"role": "assistant", "content": text()})
        yield system + turns[: len(turns) - rng.choice((0, 0, 0, 1))]


def without_marks(source):
    return source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


CHATML = without_marks(BUILTIN["chatml"].source)
