"""Conversations to datasets: ids and masks, every policy, and that nothing bad in a record is more than a count."""

import gzip
import itertools

import numpy as np
import orjson
import pyarrow
import pytest
from pyarrow import parquet

from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.errors import TemplateError
from engine.data.chat.find import find_template
from engine.data.chat.template import ChatTemplate
from engine.data.preprocess import blocks, record_encoder
from engine.data.preprocess.blocks import LineBlock
from engine.data.preprocess.record_encoder import RecordEncoder, Rules
from engine.data.preprocess.sft import describe_outcomes, preprocess_sft, sft_prefix
from engine.data.preprocess.sources import RECORDS, Source, find_sources
from engine.data.storage.reader import IndexedDataset
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError, DataError
from engine.testing.tokenizers import write_chatml_tokenizer

USER, ASSISTANT = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
CHAT = {"messages": [USER, ASSISTANT]}
LONG = {"messages": [USER, {"role": "assistant", "content": "long answer " * 20}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_chatml_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def run(tmp_path, tokenizer):
    """Preprocess records (objects, or lines as bytes), or files of the names given; gives the counts."""

    def start(*inputs, template="chatml", output="out", workers=1, **rules):
        names = [name for name in inputs if isinstance(name, str)]
        if not names:
            write(tmp_path / "a.jsonl", inputs[0])
        wanted = find_template(tokenizer, template) if isinstance(template, str) else template
        sources = find_sources([str(tmp_path / name) for name in names or ["a.jsonl"]], RECORDS)
        arguments = (sources, tokenizer, wanted, str(tmp_path / output), Rules(**rules))
        return preprocess_sft(*arguments, workers=workers)

    start.output = str(tmp_path / "out")
    return start


def write(path, records):
    lines = [record if isinstance(record, bytes) else orjson.dumps(record) for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")


@pytest.fixture
def stored(tmp_path, tokenizer):
    """The documents written: text, and its targets in «»."""

    def read(output="out"):
        data = IndexedDataset(sft_prefix(str(tmp_path / output)))
        data.verify(tokenizer.vocab_size)
        starts = [data.document_start(j) for j in range(data.num_documents + 1)]
        return [_marked(data.tokens(a, b - a), data.mask(a, b - a), tokenizer) for a, b in itertools.pairwise(starts)]

    return read


def _marked(ids, mask, tokenizer):
    runs = itertools.groupby(zip(ids.tolist(), mask.tolist(), strict=True), key=lambda token: token[1])
    texts = [(is_target, tokenizer.decode([i for i, _ in tokens])) for is_target, tokens in runs]
    return "".join(f"«{text}»" if is_target else text for is_target, text in texts)


ANSWERED = "<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\n«answer<|im_end|>»\n"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (CHAT, ANSWERED),
        ({"conversations": [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]}, ANSWERED),
        ({"instruction": "question", "output": "answer"}, ANSWERED),
        ({"prompt": [USER], "completion": [ASSISTANT]}, ANSWERED),
        ({"prompt": "a b", "completion": " c"}, "a b« c<|endoftext|>»"),
        ({"prompt": "", "completion": "abc"}, "a«bc<|endoftext|>»"),
        ({"text": "abc"}, "a«bc<|endoftext|>»"),
        ({"text": "abc<|endoftext|>"}, "a«bc<|endoftext|>»"),
        (
            {"input_ids": [0, 1, 2, 1], "labels": [-100, 1, -100, 1]},
            "<|endoftext|>«<|im_start|>»<|im_end|>«<|im_start|>»",
        ),
        ({"input_ids": [0, 1, 2], "loss_mask": [1, 1, 0]}, "<|endoftext|>«<|im_start|>»<|im_end|>"),
    ],
)
def test_what_the_targets_are(run, stored, record, expected):
    counts = run([record])
    assert stored() == [expected]
    assert (counts.conversations, counts.rejected) == (1, 0)
    assert counts.tokens > counts.num_targets > 0


MANY = [USER, {"role": "assistant", "content": "first"}, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("record", "train_on", "targets"),
    [
        ({"messages": MANY}, "assistant", ["first<|im_end|>", "answer<|im_end|>"]),
        ({"messages": MANY}, "last", ["answer<|im_end|>"]),
        ({"prompt": MANY[:3], "completion": MANY[3:]}, "assistant", ["answer<|im_end|>"]),
        ({"prompt": MANY[:1], "completion": MANY[1:]}, "assistant", ["first<|im_end|>", "answer<|im_end|>"]),
        ({"prompt": "abc", "completion": "d"}, "all", ["bcd<|endoftext|>"]),
        ({"prompt": "abc", "completion": "d"}, "last", ["d<|endoftext|>"]),
    ],
)
def test_train_on(run, stored, record, train_on, targets):
    run([record], train_on=train_on)
    (text,) = stored()
    assert [part.partition("»")[0] for part in text.split("«")[1:]] == targets


def test_all_tokens_but_the_first(run):
    counts = run([{"messages": [USER]}], train_on="all")
    assert counts.num_targets == counts.tokens - 1


def test_formats_are_counted_by_file(run, tmp_path):
    write(tmp_path / "a.jsonl", [CHAT, CHAT, {"text": "abc"}])
    write(tmp_path / "b.jsonl", [{"instruction": "q", "output": "a"}, {"nothing": 1}])
    counts = run("a.jsonl", "b.jsonl")
    assert counts.formats == {
        str(tmp_path / "a.jsonl"): {"messages": 2, "text": 1}, str(tmp_path / "b.jsonl"): {"alpaca": 1},
    }  # fmt: skip
    assert (counts.conversations, counts.documents, counts.rejected) == (4, 4, 1)


def test_what_is_told_beside_the_data(run, tmp_path, tokenizer):
    run([CHAT, b"bad"])
    info = IndexedDataset(sft_prefix(str(tmp_path / "out"))).info
    assert info.chat_template == find_template(tokenizer, "chatml").source
    assert (info.end_of_turn_id, info.eod_id, info.skipped) == (2, 0, 1)
    run([{"text": "abc"}, {"prompt": "a", "completion": "b"}])
    info = IndexedDataset(sft_prefix(str(tmp_path / "out"))).info
    assert (info.chat_template, info.end_of_turn_id) == (None, None)


def test_without_a_template_only_conversations_are_refused(run):
    reason = ConfigError("no template here")
    assert run([{"text": "abc"}], template=reason).documents == 1
    with pytest.raises(ConfigError, match="no template here"):
        run([{"text": "abc"}, CHAT], template=reason)


BAD = {  # what is in a line: the problem it is counted as
    b"plain text": "not JSON",
    b"{": "not JSON",
    b'{"text": "\xff"}': "not JSON",
    b'{"text": "\\ud800"}': "not JSON",
    b'{"messages":' * 100_000: "not JSON",
    b"\x00" * 100: "not JSON",
    b'["text"]': "not an object",
    b"17": "not an object",
    b"{}": "unknown format",
    b'{"question": "q"}': "unknown format",
    b'{"messages": null}': "null content",
    b'{"messages": "text"}': "wrong type",
    b'{"messages": []}': "empty conversation",
    b'{"messages": [null]}': "wrong type",
    b'{"messages": [{"content": "x"}]}': "unknown role",
    b'{"messages": [{"role": "critic", "content": "x"}]}': "unknown role",
    b'{"messages": [{"role": "user", "content": "x"}]}': "no assistant turn",
    b'{"messages": [{"role": "assistant", "content": ""}]}': "empty turn",
    b'{"messages": [{"role": "assistant", "content": null}]}': "null content",
    b'{"messages": [{"role": "assistant", "content": 5}]}': "wrong type",
    b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "no text",
    b'{"messages": [{"role": "assistant", "content": "a"}], "tools": "{"}': "wrong type",
    b'{"conversations": [{"from": "narrator", "value": "x"}]}': "unknown role",
    b'{"conversations": [{"from": "gpt"}]}': "null content",
    b'{"instruction": "", "output": "a"}': "empty turn",
    b'{"instruction": "q", "output": "a", "history": [1]}': "wrong type",
    b'{"prompt": "p", "completion": " "}': "empty turn",
    b'{"prompt": "p", "completion": []}': "wrong type",
    b'{"text": ""}': "empty turn",
    b'{"text": 5}': "wrong type",
    b'{"input_ids": [], "labels": []}': "empty conversation",
    b'{"input_ids": [1]}': "no mask",
    b'{"input_ids": [1, 2], "labels": [1]}': "different lengths",
    b'{"input_ids": [1, 2], "labels": [1, 3]}': "different labels",
    b'{"input_ids": [1, 2], "loss_mask": [0, 7]}': "wrong type",
    b'{"input_ids": [1, 2], "loss_mask": [1, 0]}': "no target",
    b'{"input_ids": [1, 2], "labels": [-100, -100]}': "no target",
    b'{"input_ids": [1, 9999], "labels": [1, 9999]}': "id outside the vocabulary",
    b'{"input_ids": [1, -5], "loss_mask": [1, 1]}': "id outside the vocabulary",
    b'{"input_ids": [1, 99999999999999], "loss_mask": [1, 1]}': "id outside the vocabulary",
    orjson.dumps({"messages": [{"role": "user", "content": "q" * 500}, ASSISTANT]}): "no target when cut",
}


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_records_are_counted_and_kept(run, stored, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(blocks.read_blocks, "__defaults__", (300,))
    lines = [line for bad in BAD for line in (bad, CHAT)]
    counts = run(lines, workers=workers, max_length=200)
    assert stored() == [ANSWERED] * len(BAD)
    expected = list(BAD.values())
    assert counts.problems == {problem: expected.count(problem) for problem in expected}
    assert counts.rejected == len(BAD) >= 40
    kept = [orjson.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_bytes().splitlines()]
    assert [item["line"] for item in kept] == list(range(1, 2 * len(BAD), 2))
    assert [item["reason"].partition(": ")[0] for item in kept] == expected


def test_what_the_template_refuses(run, tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'question' %}{{ raise_exception('I do not answer') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    fine = {"messages": [{"role": "user", "content": "other"}, ASSISTANT]}
    counts = run([CHAT, fine], template=str(tmp_path / "t.jinja"))
    assert (counts.documents, counts.problems) == (1, {"refused by the template": 1})
    assert "I do not answer" in (tmp_path / "out.rejects.jsonl").read_text()


def test_what_is_too_much_for_the_template_ends_nothing(run, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    deep = b'{"messages": [%s], "tools": [%s]}' % (orjson.dumps(ASSISTANT), b"[" * 900 + b"]" * 900)
    counts = run([deep, CHAT], template=str(tmp_path / "t.jinja"))
    assert (counts.documents, counts.rejected) == (1, 1)


@pytest.mark.parametrize("block_bytes", [500, 1 << 20])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_template_that_runs_away_only_for_real_conversations_ends_the_work(
    run, tmp_path, monkeypatch, block_bytes, workers
):
    monkeypatch.setattr(blocks.read_blocks, "__defaults__", (block_bytes,))
    (tmp_path / "t.jinja").write_text(
        "{% if messages[0].content == 'question' %}{{ ''.__class__ }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    fine = {"messages": [{"role": "user", "content": "other"}, ASSISTANT]}
    counts = run([fine] + [CHAT] * 99, template=str(tmp_path / "t.jinja"), workers=workers)
    assert (counts.documents, counts.problems) == (1, {"over the budget of the template": 99})
    with pytest.raises(
        DataError, match=r"^10\d conversations are over the budget .* forbidden operation: .*__class__.*chat_template"
    ):
        run([fine] + [CHAT] * 200, template=str(tmp_path / "t.jinja"), workers=workers, output="new/out")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_template_that_fails_for_all_is_refused(run, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for i in range(10 ** 9) %}{{ messages }}{% endfor %}")
    with pytest.raises(TemplateError):
        run([CHAT], template=str(tmp_path / "t.jinja"))


@pytest.mark.parametrize(
    ("records", "rules", "told"),
    [
        ([b"bad", b"{}"], {}, "1 rejected: not JSON; 1 rejected: unknown format"),
        ([], {}, "no records"),
        ([LONG, LONG], {"max_length": 60, "on_too_long": "drop"}, "2 too long, dropped"),
        ([LONG], {"max_length": 10}, "1 rejected: no target when cut"),
    ],
)
def test_nothing_left_to_learn_is_refused(run, tmp_path, records, rules, told):
    with pytest.raises(DataError, match=f"no targets in .*a.jsonl: {told}"):
        run(records, output="new/out", **rules)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_of_something_else_is_noticed_early(run):
    with pytest.raises(DataError, match=r"lines and no document; .*unknown format.*expected objects with one of"):
        run([{"question": "q"}] * 30_000)


def whole_dataset(prefix):
    data = IndexedDataset(sft_prefix(prefix))
    return data.tokens(0, data.num_tokens).copy(), data.mask(0, data.num_tokens).copy()


def whole(stored_text):
    return stored_text.replace("«", "").replace("»", "")


def test_too_long_is_cut_to_the_first_tokens(run, stored):
    run([LONG])
    (full,) = stored()
    counts = run([CHAT, LONG], max_length=100)
    short, cut = stored()
    assert (short, counts.outcome["truncated"]) == (ANSWERED, 1)
    assert cut.startswith(full[:60]) and cut.endswith("»") and whole(cut) == whole(full)[: len(whole(cut))]
    assert counts.conversations == counts.documents == 2
    assert "1 too long, truncated to max_length" in describe_outcomes(counts)


def test_the_longest_that_is_not_too_long(run):
    length = run([CHAT]).tokens
    assert run([CHAT], max_length=length, on_too_long="drop").documents == 1
    with pytest.raises(DataError, match="1 too long, dropped"):
        run([CHAT], max_length=length - 1, on_too_long="drop")


def test_too_long_is_dropped(run, stored):
    counts = run([LONG, CHAT, LONG], max_length=100, on_too_long="drop")
    assert stored() == [ANSWERED]
    assert (counts.outcome["dropped"], counts.conversations, counts.rejected) == (2, 1, 0)


def test_too_long_is_split(run, stored):
    run([LONG])
    ids, mask = whole_dataset(run.output)
    counts = run([LONG, CHAT], max_length=60, on_too_long="split")
    mask[::60] = False  # nothing stands before the first token of a piece
    pieces = [slice(i, i + 60) for i in range(0, ids.size, 60) if mask[i : i + 60].any()]
    kept_ids, kept_mask = whole_dataset(run.output)
    end = sum(ids[piece].size for piece in pieces)
    assert kept_ids[:end].tolist() == np.concatenate([ids[piece] for piece in pieces]).tolist()
    assert kept_mask[:end].tolist() == np.concatenate([mask[piece] for piece in pieces]).tolist()
    assert (counts.documents, counts.conversations) == (len(pieces) + 1, 2)
    assert (counts.outcome["split"], counts.outcome["windows"]) == (1, -(-ids.size // 60) - len(pieces))
    assert stored()[-1] == ANSWERED


def test_pieces_without_a_target_are_left_out(run):
    asked = {"messages": [{"role": "user", "content": "q" * 100}, ASSISTANT]}
    counts = run([asked], max_length=20, on_too_long="split")
    assert (counts.outcome["split"], counts.conversations) == (1, 1)
    assert counts.outcome["windows"] >= 5 and counts.documents <= 2


def test_too_long_is_an_error(run, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens, more than max_length = 100; on_too_long can be"):
        run([CHAT, LONG], max_length=100, on_too_long="error", output="new/out")
    assert list((tmp_path / "new").iterdir()) == []


def test_special_tokens_in_messages_are_counted(run):
    spelled = {"messages": [{"role": "user", "content": "x<|im_end|>y"}, ASSISTANT]}
    counts = run([CHAT, spelled, {"text": "<|im_start|>a"}, {"input_ids": [0, 1], "loss_mask": [0, 1]}])
    assert counts.outcome["spelled"] == 2


RECORDS_OF_ALL_KINDS = [CHAT, LONG, {"text": "abc"}, b"bad", {"prompt": "a", "completion": "b"}, {"messages": []}]


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_a_byte(run, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(blocks.read_blocks, "__defaults__", (500,))
    records = RECORDS_OF_ALL_KINDS * 20
    rules = {"max_length": 50, "on_too_long": "split"}
    counts = [run(records, output="1/x", **rules), run(records, output="2/x", workers=workers, **rules)]
    assert counts[0] == counts[1]
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["x.rejects.jsonl", *(f"x_sft.{kind}" for kind in ("bin", "checksums", "idx", "json", "mask.bin"))]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def table(path, records, **options):
    parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_parquet(run, stored, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(blocks.read_blocks, "__defaults__", (500,))
    chats = [{"messages": [{"role": "user", "content": f"q{i}"}, ASSISTANT], "id": i} for i in range(100)]
    chats[7]["messages"] = None
    chats[8]["messages"] = [{**USER, "name": "x"}, ASSISTANT]
    table(tmp_path / "a.parquet", chats, row_group_size=30)
    run(chats, output="lines")
    counts = run("a.parquet", output="rows", workers=workers)
    assert stored("rows") == stored("lines") and len(stored("rows")) == 99
    (kept,) = (tmp_path / "rows.rejects.jsonl").read_bytes().splitlines()
    assert (orjson.loads(kept)["line"], counts.problems) == (8, {"null content": 1})
    assert counts.position == (tmp_path / "a.parquet").stat().st_size


def test_odd_parquet(run, tmp_path):
    """Types without a word in JSON, text that is not UTF-8, and a damaged file."""
    raw = pyarrow.array([b"ok", b"\xff\xfe", b"fine"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": raw, "other": [b"\x00", b"\x01", b"\x02"]}), tmp_path / "a.parquet")
    counts = run("a.parquet")
    assert (counts.documents, counts.problems) == (2, {"not JSON": 1})
    table(tmp_path / "b.parquet", [{"text": b"bytes"}, {"text": b"more"}])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "c.parquet").write_bytes(content[:50])
    (tmp_path / "d.parquet").write_bytes(b"")
    counts = run(*(f"{name}.parquet" for name in "abcd"))
    assert counts.problems == {"not JSON": 1, "null content": 2, "unreadable file": 2}


def test_parquet_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"a\.parquet needs the package pyarrow: pip install 'triaxis\[parquet\]'"):
        find_sources([str(tmp_path)], RECORDS)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
def test_one_json_array(run, stored, tmp_path, monkeypatch, name, block_bytes):
    monkeypatch.setattr(blocks.read_blocks, "__defaults__", (block_bytes,))
    content = b"\xef\xbb\xbf \n" + orjson.dumps([CHAT, 5, {"text": "abc\nd"}], option=orjson.OPT_INDENT_2)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    counts = run(name)
    assert stored() == [ANSWERED, "a«bc\nd<|endoftext|>»"]
    assert counts.problems == {"not an object": 1}
    assert orjson.loads((tmp_path / "out.rejects.jsonl").read_bytes())["line"] == 2


def test_a_json_file_of_lines(run, tmp_path):
    write(tmp_path / "a.json", [CHAT, {"text": "abc"}])
    assert run("a.json").documents == 2


def test_an_array_with_an_element_that_is_nested_too_deep(run, stored, tmp_path):
    deep = b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}"
    (tmp_path / "a.json").write_bytes(b"[" + orjson.dumps(CHAT) + b"," + deep + b"]")
    counts = run("a.json")
    assert stored() == [ANSWERED] and counts.problems == {"wrong type": 1}
    (tmp_path / "a.json").write_bytes(b"[" + orjson.dumps(CHAT) + b",\n" + deep.replace(b" ", b"\n") + b"]")
    assert run("a.json").problems == {"not JSON": 1}
    assert stored() == [ANSWERED]


def test_damaged_and_huge_arrays(run, tmp_path, monkeypatch):
    write(tmp_path / "good.jsonl", [CHAT])
    (tmp_path / "bad.json").write_bytes(b"[" + orjson.dumps(CHAT) + b",")
    names = ("good.jsonl", "bad.json")
    counts = run(*names)
    assert (counts.documents, counts.problems) == (2, {"unreadable file": 1})
    assert "the JSON array has no end" in (tmp_path / "out.rejects.jsonl").read_text()
    (tmp_path / "bad.json").write_bytes(b"[" + orjson.dumps(CHAT) + b', {"text": "' + b"x" * 5000)
    monkeypatch.setattr(blocks, "MAX_DOCUMENT_BYTES", 4000)
    counts = run(*names)
    assert (counts.documents, counts.problems) == (2, {"unreadable file": 1})
    assert "an element of the JSON array is longer than 4,000" in (tmp_path / "out.rejects.jsonl").read_text()


def test_directories_hold_lines_and_parquet(tmp_path):
    for name in ("b.jsonl.gz", "a.parquet", "readme.md", "info.json", "notes.txt", "x.rejects.jsonl"):
        (tmp_path / name).write_bytes(b"")
    found = [source.path for source in find_sources([str(tmp_path)], RECORDS)]
    assert found == [str(tmp_path / name) for name in ("a.parquet", "b.jsonl.gz", "info.json")]
    expected = r"; expected \.jsonl, \.json, each also with \.gz, \.zst, \.bz2 or \.xz, or \.parquet or \.arrow$"
    for name in ("notes.txt", "a.parquet.gz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ConfigError, match=rf"{name} has an unknown suffix{expected}"):
            find_sources([str(tmp_path / name)], RECORDS)


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}
CALLS = "{{ m.tool_calls | tojson if m.tool_calls }}"
WRITES = "{% for m in messages %}{{ m.role }}:{{ m.content }}" + CALLS + "<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("source", "tools", "problem"),
    [
        ("{{ tools | tojson if tools }}" + WRITES, TOOLS, None),
        (WRITES, None, None),
        (WRITES, TOOLS, "the template drops the tools"),
        (WRITES.replace("m.tool_calls | tojson", "''"), None, "the template drops the tool_calls of turn 1"),
    ],
)
def test_a_template_that_leaves_tools_out_is_refused(tmp_path, source, tools, problem):
    """Or the assistant would learn to answer a question with nothing."""
    tokenizer = load_tokenizer(write_chatml_tokenizer(tmp_path))
    template = ChatTemplate("test", source, {}, tuple(tokenizer.special_tokens))
    encoder = RecordEncoder(tokenizer, ChatEncoder(tokenizer, template), Rules())
    record = {"messages": [{"role": "user", "content": "Rain?"}, CALL], "tools": tools}
    block = LineBlock(Source("a.jsonl", "lines", 1), 1, orjson.dumps(record), 1)
    encoded = encoder(block)
    assert encoded.problems == ({} if problem is None else {"tools not written": 1})
    assert problem is None or problem in encoded.rejects[0].reason
    assert bool(encoded.lengths[0].size) == (problem is None)


def test_records_that_are_too_large_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record_encoder, "MAX_RECORD_BYTES", 50)
    tokenizer = load_tokenizer(write_chatml_tokenizer(tmp_path))
    encoder = RecordEncoder(tokenizer, ConfigError("none"), Rules())
    lines = [orjson.dumps({"text": "a" * count}) for count in (10, 100)]
    encoded = encoder(LineBlock(Source("a.jsonl", "lines", 1), 1, b"\n".join(lines), 1))
    assert encoded.problems == {"too large": 1} and encoded.lengths[0].tolist() == [11]


CALLS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ '<call>' }}ARGUMENTS{{ '</call>' }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
ARGUMENTS = {
    "as JSON": "{{ c.function.arguments | tojson }}",
    "item by item": "{{ '{' }}{% for k, v in c.function.arguments.items() %}{{ k | tojson }}: {{ v | tojson }}"
    "{% endfor %}{{ '}' }}",
    "texts joined": "{{ '' + c.function.arguments }}",
    "as it is": "{{ c.function.arguments }}",
    "either": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
}


@pytest.mark.parametrize("arguments", [{"pond": "mill"}, '{"pond": "mill"}', '{"pond":"mill"}'])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_calls_are_written_as_one_object(run, stored, tokenizer, name, arguments):
    """As objects or as OpenAI's texts, for templates that expect either."""
    source = CALLS.replace("ARGUMENTS", ARGUMENTS[name])
    known = find_template(tokenizer, "chatml")
    call = {"type": "function", "function": {"name": "depth", "arguments": arguments}}
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    template = ChatTemplate("calls", source, known.special_tokens_map, known.special)
    if isinstance(arguments, dict) and name in ("texts joined", "as it is"):
        return  # such a template fails for objects, or writes them as Python does
    run([{"messages": chat}], template=template)
    (document,) = stored()
    written = document.split("<call>")[1].split("</call>")[0]
    assert orjson.loads(written) == {"pond": "mill"}, document


ODD_ARGUMENTS = [
    '{"id": 123456789012345678901234, "x": 0.10, "y": 1e5}',
    '{"name": "caf\\u00e9 \\/", "v": NaN}',
    '{ "pond":"mill" }',
    "{ }",
]
AS_IN_QWEN3 = (
    "{{- '{\"arguments\": ' }}{%- if c.function.arguments is string %}{{- c.function.arguments }}{%- else %}"
    "{{- c.function.arguments | tojson }}{%- endif %}{{- '}' }}"
)


@pytest.mark.parametrize("arguments", ODD_ARGUMENTS)
@pytest.mark.parametrize("name", ["qwen3", "as it is"])
def test_a_template_that_writes_texts_as_they_are_gets_them(tmp_path, name, arguments):
    """Ids are those of transformers, which hands on what is there."""
    transformers = pytest.importorskip("transformers")
    source = CALLS.replace("ARGUMENTS", {"qwen3": AS_IN_QWEN3, **ARGUMENTS}[name])
    directory = write_chatml_tokenizer(tmp_path)
    tokenizer = load_tokenizer(directory)
    known = find_template(tokenizer, "chatml")
    template = ChatTemplate("calls", source, known.special_tokens_map, known.special)
    call = {"type": "function", "function": {"name": "depth", "arguments": arguments}}
    chat = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    encoder = RecordEncoder(tokenizer, ChatEncoder(tokenizer, template), Rules())
    encoded = encoder(LineBlock(Source("a.jsonl", "lines", 1), 1, orjson.dumps({"messages": chat}), 1))
    assert not encoded.rejects
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    expected = theirs.apply_chat_template(chat, chat_template=source, return_dict=False)
    assert encoded.ids[0].tolist() == expected, theirs.decode(expected)
