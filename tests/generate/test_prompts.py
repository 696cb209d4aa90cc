import orjson
import pytest

from engine.errors import ConfigError, DataError
from engine.generate.prompts import AnswerFile, conversation, read_prompts

PROMPTS = [{"prompt": "a", "id": i} for i in range(4)]
SETTINGS = {"model": "/a", "--seed": 3, "--temperature": 0.1, "--system": None}


def answer(number: int) -> dict:
    return PROMPTS[number] | {"completion": "b", "num_tokens": 1, "stopped": "length"}


def test_prompts_are_read_in_order_and_blank_lines_are_none(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "x\\u00e4", "id": 3}\r\n\n  \n{"messages": [{"role": "user", "content": ""}]}')
    assert read_prompts(path, chat=True) == [
        {"prompt": "xä", "id": 3},
        {"messages": [{"role": "user", "content": ""}]},
    ]


def test_conversations_begin_with_the_system_message_once():
    user = {"role": "user", "content": "q"}
    own = [{"role": "system", "content": "own"}, user]
    assert conversation({"prompt": "q"}) == [user]
    assert conversation({"prompt": "q"}, "s") == [{"role": "system", "content": "s"}, user]
    assert conversation({"messages": own}, "s") == own


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", "unexpected end of data"),
        (b"\xff", "str is not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "line 2"),
        (b"NaN", "line 2"),
        (b"[]", "expected an object, not a list"),
        (b"null", "expected an object, not a NoneType"),
        (b"{}", r'either "prompt" or "messages", found the fields \[\]'),
        (b'{"text": "x"}', r"found the fields \['text'\]"),
        (b'{"prompt": "x", "messages": []}', 'either "prompt" or "messages"'),
        (b'{"prompt": ""}', "empty or not a text"),
        (b'{"prompt": 3}', "empty or not a text"),
        (b'{"prompt": "x", "completion": "y"}', "'completion' is reserved for the answer"),
        (b'{"prompt": "x", "error": null}', "'error' is reserved for the answer"),
        (b'{"prompt": "x", "more": ' + b"[" * 400 + b"]" * 400 + b"}", "Recursion limit reached"),
        (b'{"messages": {}}', "empty or not a list"),
        (b'{"messages": []}', "empty or not a list"),
        (b'{"messages": ["x"]}', "a message is an object"),
        (b'{"messages": [{"role": "user"}]}', "a message is an object"),
        (b'{"messages": [{"role": [], "content": "x"}]}', "a message is an object"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "there is nothing to answer"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, expected):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n' + line + b"\n")
    with pytest.raises(DataError, match="line 2") as error:
        read_prompts(path, chat=True)
    with pytest.raises(DataError, match=expected):
        raise error.value


def test_a_bad_line_is_quoted_as_text(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "naïve\x7f"}\n')
    with pytest.raises(DataError, match=r"""it starts '{"text": "naïve\\x7f"}'$"""):
        read_prompts(path, chat=True)


def test_files_without_prompts(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_prompts(tmp_path / "none", chat=False)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_prompts(tmp_path, chat=False)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="has no prompts"):
        read_prompts(tmp_path / "empty", chat=False)
    (tmp_path / "chat").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(DataError, match=r"line 1.*need chat mode"):
        read_prompts(tmp_path / "chat", chat=False)


@pytest.mark.parametrize(
    "torn", [b"", b'{"prompt": "a", "id": 2, "completion": "' + b"b" * 999, orjson.dumps(answer(2))]
)
def test_answers_go_on_behind_the_last_complete_one(tmp_path, torn):
    path = tmp_path / "answers.jsonl"
    first = AnswerFile(path, PROMPTS, SETTINGS)
    assert first.answered == 0
    first.write([answer(0), answer(1)])
    first.close()
    path.write_bytes(path.read_bytes() + torn)

    second = AnswerFile(path, PROMPTS, SETTINGS)
    assert second.answered == 2
    second.write([answer(2), PROMPTS[3] | {"error": "too long"}])
    assert second.answered == 4
    second.close()
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert lines == [answer(0), answer(1), answer(2), PROMPTS[3] | {"error": "too long"}]
    assert AnswerFile(path, PROMPTS, SETTINGS).answered == 4


@pytest.mark.parametrize(
    "content",
    [b"not json\n", b"[]\n", b"\n", orjson.dumps(answer(1)) + b"\n", orjson.dumps(PROMPTS[0]) + b"\n"],
)
def test_what_is_not_an_answer_to_these_prompts_stays_as_it_is(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="line 1 is not the answer to prompt 1"):
        AnswerFile(path, PROMPTS, SETTINGS)
    assert path.read_bytes() == content


def test_more_answers_than_prompts(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"".join(orjson.dumps(answer(i)) + b"\n" for i in range(3)))
    with pytest.raises(DataError, match="line 3 is not"):
        AnswerFile(path, PROMPTS[:2], SETTINGS)


def test_answers_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        AnswerFile(tmp_path / "none" / "answers.jsonl", PROMPTS, SETTINGS)
    with pytest.raises(ConfigError, match="Is a directory"):
        AnswerFile(tmp_path, PROMPTS, SETTINGS)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("model", "/b", '"/a", expected "/b"'),
        ("--seed", 4, "3, expected 4"),
        ("--system", "", 'none, expected ""'),
    ],
)
def test_answers_made_with_other_settings_stay_as_they_are(tmp_path, name, value, shown):
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path, PROMPTS, SETTINGS)
    file.write([answer(0)])
    file.close()
    path.write_bytes(before := path.read_bytes() + b"torn")
    with pytest.raises(ConfigError, match=f"made with {name} = {shown}; name another output file, or remove this one"):
        AnswerFile(path, PROMPTS, SETTINGS | {name: value})
    assert path.read_bytes() == before
    assert AnswerFile(path, PROMPTS, SETTINGS).answered == 1


def test_settings_are_there_before_the_first_answer(tmp_path):
    path = tmp_path / "answers.jsonl"
    beside = tmp_path / "answers.jsonl.settings.json"
    AnswerFile(path, PROMPTS, {}).close()
    file = AnswerFile(path, PROMPTS, SETTINGS)  # nothing was made with the others
    assert orjson.loads(beside.read_bytes()) == SETTINGS
    file.write([answer(0)])
    file.close()
    for content, problem in (
        (None, "No such file"),
        (b"{", "is not JSON, expected the settings of the answers"),
        (b"[]", "model = none"),
    ):
        beside.unlink() if content is None else beside.write_bytes(content)
        with pytest.raises(ConfigError, match=problem):
            AnswerFile(path, PROMPTS, SETTINGS)
    path.unlink()
    AnswerFile(path, PROMPTS, SETTINGS).close()
    assert orjson.loads(beside.read_bytes()) == SETTINGS
