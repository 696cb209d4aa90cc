"""Records of every published shape, and everything that can be wrong with one."""

import orjson
import pytest

from engine.data.preprocess.records import BadRecord, Conversation, Text, Tokens, parse_record

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def parse(record):
    return parse_record(orjson.dumps(record))


def turn(**fields):
    return {"messages": [USER, fields]}


def shared(*turns):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


@pytest.mark.parametrize(
    ("record", "name", "content"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "messages", Conversation([SYSTEM, USER, ASSISTANT])),
        ({"messages": [USER, ASSISTANT], "id": 7, "prompt": "q"}, "messages", Conversation([USER, ASSISTANT])),
        ({"messages": [USER, ASSISTANT], "text": "q a"}, "messages", Conversation([USER, ASSISTANT])),
        ({"messages": None, "text": "t"}, "text", Text("", "t")),  # a column of another row, as Parquet has it
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]}]},
            "messages",
            Conversation([{"role": "user", "content": "q!"}]),
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
            "messages",
            Conversation([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [TOOL]),
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "", "name": "f", "tool_call_id": None}, ASSISTANT]},
            "messages",
            Conversation([USER, {"role": "tool", "content": "", "name": "f"}, ASSISTANT]),
        ),
        (
            {"messages": [USER, ASSISTANT], "tools": orjson.dumps([TOOL]).decode()},
            "messages",
            Conversation([USER, ASSISTANT], [TOOL]),
        ),
        ({"messages": [USER, ASSISTANT], "tools": " "}, "messages", Conversation([USER, ASSISTANT])),
        (shared(("human", "q"), ("gpt", "a")), "sharegpt", Conversation([USER, ASSISTANT])),
        (shared(("user", "q"), ("chatgpt", "a")), "sharegpt", Conversation([USER, ASSISTANT])),
        (shared(("system", "s"), ("human", "q"), ("bing", "a")), "sharegpt", Conversation([SYSTEM, USER, ASSISTANT])),
        (
            shared(("human", "q"), ("function_call", "f()"), ("observation", "1"), ("gpt", "a")),
            "sharegpt",
            Conversation(
                [USER, {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "1"}, ASSISTANT],
            ),
        ),
        ({"conversations": [USER, ASSISTANT]}, "sharegpt", Conversation([USER, ASSISTANT])),
        ({**shared(("human", "q"), ("gpt", "a")), "system": "s"}, "sharegpt", Conversation([SYSTEM, USER, ASSISTANT])),
        ({**shared(("human", "q"), ("gpt", "a")), "system": ""}, "sharegpt", Conversation([USER, ASSISTANT])),
        ({"instruction": "q", "output": "a"}, "alpaca", Conversation([USER, ASSISTANT])),
        ({"instruction": "q", "input": "", "output": "a", "text": "q a"}, "alpaca", Conversation([USER, ASSISTANT])),
        (
            {"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["q", "a"]]},
            "alpaca",
            Conversation([SYSTEM, USER, ASSISTANT, {"role": "user", "content": "q\n\nx"}, ASSISTANT]),
        ),
        ({"prompt": "p", "completion": "c"}, "prompt/completion", Text("p", "c")),
        ({"prompt": "", "completion": "c"}, "prompt/completion", Text("", "c")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt/completion", Conversation([USER, ASSISTANT])),
        (
            {"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT]},
            "prompt/completion",
            Conversation([USER, ASSISTANT, USER, ASSISTANT]),
        ),
        (
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            "prompt/completion",
            Conversation([USER, ASSISTANT, USER, ASSISTANT], train_on="last"),
        ),
        ({"text": "t"}, "text", Text("", "t")),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "tokens", Tokens([1, 2], [False, True])),
        ({"input_ids": [1, 2], "loss_mask": [0, 1]}, "tokens", Tokens([1, 2], [False, True])),
        ({"input_ids": [1, 2], "assistant_masks": [False, True]}, "tokens", Tokens([1, 2], [False, True])),
        ({"input_ids": [1, 2], "completion_mask": [1, 0], "text": "t"}, "tokens", Tokens([1, 2], [True, False])),
    ],
)
def test_every_format(record, name, content):
    assert parse(record) == (name, content)


BAD = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b'{"text": "\xff\xfe"}', "not JSON"),
    (b'{"text": "\\ud800"}', "not JSON"),
    (b'{"messages":' + b"[" * 100_000, "not JSON"),
    (b'{"text": NaN}', "null content"),
    (b"null", "not an object"),
    (b'["text"]', "not an object"),
    (b'"text"', "not an object"),
    ({}, "unknown format"),
    ({"question": "q", "answer": "a"}, "unknown format"),
    ({"prompt": "q"}, "unknown format"),
    ({"messages": None}, "null content"),
    ({"prompt": "q", "completion": None}, "null content"),
    ({"messages": "q a"}, "wrong type"),
    ({"messages": {"role": "user"}}, "wrong type"),
    ({"messages": []}, "empty conversation"),
    ({"conversations": []}, "empty conversation"),
    ({"messages": ["q", "a"]}, "wrong type"),
    (turn(role="critic", content="a"), "unknown role"),
    (turn(role="Assistant", content="a"), "unknown role"),
    (turn(role=5, content="a"), "unknown role"),
    (turn(role=["user"], content="a"), "unknown role"),
    (turn(content="a"), "unknown role"),
    (shared(("human", "q"), ("narrator", "a")), "unknown role"),
    (turn(role="assistant", content=None), "null content"),
    (turn(role="assistant"), "null content"),
    (turn(role="assistant", content=None, tool_calls=[]), "null content"),
    (turn(role="assistant", content=""), "empty turn"),
    (turn(role="user", content=" \n"), "empty turn"),
    (turn(role="assistant", content=[]), "empty turn"),
    (turn(role="assistant", content=5), "wrong type"),
    (turn(role="assistant", content={"text": "a"}), "wrong type"),
    (turn(role="assistant", content=["a"]), "wrong type"),
    (turn(role="assistant", content=[{"type": "text", "text": 1}]), "wrong type"),
    (turn(role="user", content=[{"type": "image_url", "image_url": "x"}]), "no text"),
    (turn(role="user", content=[{"type": "text", "text": None}]), "null content"),
    ({"messages": [USER, ASSISTANT], "tools": "{"}, "wrong type"),
    ({"messages": [USER, ASSISTANT], "tools": {"f": 1}}, "wrong type"),
    ({"messages": [USER, ASSISTANT], "tools": "5"}, "wrong type"),
    ({"messages": [USER, ASSISTANT], "tools": '"f"'}, "wrong type"),
    ({"messages": [USER, ASSISTANT], "system": 5}, "wrong type"),
    ({"instruction": "", "output": "a"}, "empty turn"),
    ({"instruction": "q", "output": " "}, "empty turn"),
    ({"instruction": 5, "output": "a"}, "wrong type"),
    ({"instruction": "q", "input": ["x"], "output": "a"}, "wrong type"),
    ({"instruction": "q", "output": "a", "history": "q a"}, "wrong type"),
    ({"instruction": "q", "output": "a", "history": [["q"]]}, "wrong type"),
    ({"instruction": "q", "output": "a", "history": [["q", None]]}, "null content"),
    ({"prompt": "p", "completion": ""}, "empty turn"),
    ({"prompt": 5, "completion": "c"}, "wrong type"),
    ({"prompt": "p", "completion": [ASSISTANT]}, "wrong type"),
    ({"prompt": [USER], "completion": "c"}, "wrong type"),
    ({"prompt": [USER, ASSISTANT], "completion": [ASSISTANT, USER, ASSISTANT]}, "unclear target"),
    ({"text": ""}, "empty turn"),
    ({"text": None}, "null content"),
    ({"text": ["t"]}, "wrong type"),
    ({"input_ids": []}, "empty conversation"),
    ({"input_ids": [1, 2]}, "no mask"),
    ({"input_ids": "12", "labels": [1, 2]}, "wrong type"),
    ({"input_ids": [[1, 2]], "labels": [1, 2]}, "wrong type"),
    ({"input_ids": [1.5], "labels": [1]}, "wrong type"),
    ({"input_ids": [True], "labels": [1]}, "wrong type"),
    ({"input_ids": [1, 2], "labels": [1]}, "different lengths"),
    ({"input_ids": [1, 2], "loss_mask": [1, 0, 1]}, "different lengths"),
    ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "wrong type"),
    ({"input_ids": [1, 2], "labels": [2, -100]}, "different labels"),
]


@pytest.mark.parametrize(("record", "problem"), BAD, ids=range(len(BAD)))
def test_every_problem(record, problem):
    with pytest.raises(BadRecord) as caught:
        parse_record(record) if isinstance(record, bytes) else parse(record)
    assert caught.value.problem == problem
    assert str(caught.value).startswith(f"{problem}: ")
    assert len(str(caught.value)) < 300
