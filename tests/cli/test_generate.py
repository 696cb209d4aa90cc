import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.checkpoint.huggingface.config import hf_config
from engine.checkpoint.load import load_decoder
from engine.cli import generate
from engine.cli.generate import _print, main
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.find import find_template
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError, DataError, PeerError
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.testing.distributed import run_ranks
from engine.testing.models import logical_state, new_parameters, tiny_config
from engine.testing.runs import run_config, run_training

TOOLS = Path(__file__).parents[2] / "tools"


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def greedy(directory: Path, *options: str) -> str:
    done = tool("generate", directory, "--prompt", "abcabcabc", "--max-new-tokens", 12, "--temperature", 0, *options)
    assert done.returncode == 0, done.stderr
    assert "12 tokens in" in done.stderr
    return done.stdout


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3"])
def test_a_run_a_checkpoint_and_its_export_write_the_same_text(workspace, preset):
    config = run_config(workspace, preset=preset, steps=30)
    run_training(config)
    exported, imported = workspace / "hf", workspace / "imported"
    assert tool("convert_checkpoint", "--from", config.run.dir, "--to", exported, "--dtype", "fp32").returncode == 0
    assert tool("convert_checkpoint", "--from", exported, "--to", imported).returncode == 0
    text = greedy(config.run.dir)
    assert text.startswith("abcabcabc")
    assert len(text.strip()) > 9
    assert greedy(config.run.dir / "checkpoints/step_00000030") == text
    assert greedy(exported) == text
    assert greedy(imported) == text

    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    _decoder, tokenizer = load_decoder(exported, torch.float32, torch.device("cpu"))
    ids = torch.tensor([tokenizer.encode("abcabcabc")])
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    assert tokenizer.decode(theirs) == text.removesuffix("\n")


ANSWERS = {"A?": "apple", "B?": "pear", "C?": "plum"}
CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_tokenizer(directory: Path) -> None:
    """Bytes and three special tokens, with a chat template."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[0]}))
    (directory / "chat_template.jinja").write_text(CHATML)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A Hugging Face directory whose model has learned three answers, and where they end."""
    directory = tmp_path_factory.mktemp("chatty")
    write_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    encoder = ChatEncoder(tokenizer, find_template(tokenizer))
    model = tiny_config(vocab_size=tokenizer.vocab_size, max_position=120, num_layers=2)
    parameters = new_parameters(model)
    decoder = Decoder(model, Parameters(parameters))
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3)
    random = Random(0)
    for _ in range(400):
        asked = [random.choice(list(ANSWERS)) for _ in range(2)]
        messages = [m for q in asked for m in (turn("user", q), turn("assistant", ANSWERS[q]))]
        ids, learned = (torch.from_numpy(x) for x in encoder.encode(messages))
        positions, cut = torch.arange(len(ids) - 1), (0, len(ids) - 1)
        loss = decoder.loss(ids[:-1].long(), positions, ids[1:].long(), learned[1:].float(), cut)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    config = hf_config(model, dtype=torch.float32, bos_id=None, eos_id=tokenizer.eod_id)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(logical_state(model, parameters), directory / "model.safetensors")
    return directory


@pytest.fixture
def program(capsys, monkeypatch):
    """Runs the program in this process: what it wrote to stdout and stderr."""

    def run(*arguments: object, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        main([*map(str, arguments), "--temperature", "0"])
        return capsys.readouterr()

    return run


def test_an_answer_ends_with_the_turn(program, chatty):
    out, err = program(chatty, "--chat", "--prompt", "A?")
    assert out == "apple\n"
    assert err.startswith("5 tokens in")
    assert program(chatty, "--chat", "--prompt", "-", stdin="B?").out == "pear\n"
    override = chatty / "other.jinja"
    override.write_text(CHATML.replace("m.content }}", "'B?' if m.role == 'user' else m.content }}"))
    assert program(chatty, "--chat", "--prompt", "A?", "--chat-template", override).out == "pear\n"
    assert program(chatty, "--chat", "--prompt", "A?", "--chat-template", "chatml").out == "apple\n"


def test_a_conversation_goes_on_turn_by_turn(program, chatty):
    out, err = program(chatty, "--chat", stdin="A?\nB?\n/reset\nC?\n\nA?\n")
    assert out == "apple\npear\nplum\n"
    assert err == ""
    out, err = program(chatty, "--chat", stdin=f"{'x' * 120}\nC?")
    assert out == "plum\n"  # what was too long is forgotten
    assert re.fullmatch(r"the conversation has 1\d\d tokens, and the model reads at most 120; /reset .*\n", err)
    refused = turn("tool", "x")
    with pytest.raises(DataError, match=r"prompt 2: .* no tools here"):
        program(chatty, "--chat", *file_of(chatty, [{"prompt": "A?"}, {"messages": [refused]}]))


@pytest.mark.parametrize("end", ["/exit", "/quit", ""])
def test_commands_are_not_said_to_the_model(program, chatty, monkeypatch, end):
    asked = []
    prompt_ids = ChatEncoder.prompt_ids

    def watched(self, messages, tools=None):
        asked.append(messages[-1]["content"])
        return prompt_ids(self, messages, tools)

    monkeypatch.setattr(ChatEncoder, "prompt_ids", watched)
    _, err = program(chatty, "--chat", stdin=f"/help\n/\n/system x\n/etc/hosts?\nA?\n{end}\nB?\n")
    commands = "an empty line, Ctrl-D, /exit or /quit ends; /reset starts over"
    assert err == "".join(f"{name} is not a command: {commands}\n" for name in ("/help", "/", "/system"))
    assert asked == ["/etc/hosts?", "A?"]
    shown = tool("generate", "--help").stdout
    assert f"In a conversation, {commands}." in shown and "DIR --chat --system 'Be brief.'" in shown


def test_the_template_sees_the_whole_conversation(program, chatty, monkeypatch):
    seen = []
    prompt_ids = ChatEncoder.prompt_ids

    def watched(self, messages, tools=None):
        seen.append((messages, tools))
        return prompt_ids(self, messages, tools)

    monkeypatch.setattr(ChatEncoder, "prompt_ids", watched)
    program(chatty, "--chat", "--system", "S", stdin="A?\nB?\n/reset\nC?\n")
    first = [turn("system", "S"), turn("user", "A?")]
    second = [*first, turn("assistant", "apple"), turn("user", "B?")]
    assert seen == [(first, None), (second, None), ([turn("system", "S"), turn("user", "C?")], None)]
    seen.clear()
    prompts = [{"messages": second[1:], "tools": [{"name": "t"}]}, {"prompt": "A?"}]
    program(chatty, "--chat", "--system", "S", *file_of(chatty, prompts), "--max-new-tokens", 9)
    assert seen == [(second, [{"name": "t"}]), (first, None)]


def file_of(directory: Path, prompts: list[dict]) -> list[object]:
    path = directory / f"prompts-{len(prompts)}.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return ["--input", path, "--output", path.with_suffix(".answers")]


def answers_of(options: list[object]) -> list[dict]:
    return [json.loads(line) for line in options[-1].read_text().splitlines()]


def test_a_file_of_prompts(program, chatty):
    questions = list(ANSWERS) * 3
    prompts = [{"prompt": q, "id": i} for i, q in enumerate(questions)]
    prompts[4] = {"messages": [turn("user", "A?"), turn("assistant", "apple"), turn("user", "B?")], "id": 4}
    prompts[5]["prompt"] = "x" * 60
    options = file_of(chatty, prompts)
    _, err = program(chatty, "--chat", *options, "--batch-size", 4, "--max-new-tokens", 60)
    answers = answers_of(options)
    assert "8 prompts answered, 1 too long for the model" in err
    assert [answer["id"] for answer in answers] == list(range(9))
    assert "prompt tokens and 60 new ones are more than the model's max_position = 120" in answers[5].pop("error")
    assert answers[5] == prompts[5]
    for i in {*range(9)} - {5}:
        expected = ANSWERS[questions[i]]
        fields = {"completion": expected, "num_tokens": len(expected), "stopped": "end of turn"}
        assert answers[i] == prompts[i] | fields

    whole = options[-1].read_bytes()
    options[-1].write_bytes(whole[:-20])  # interrupted in the last line
    _, err = program(chatty, "--chat", *options, "--max-new-tokens", 60)
    assert "has 8 of 9 answers; resuming" in err
    assert ": 1 prompt answered, " in err
    assert options[-1].read_bytes() == whole
    with pytest.raises(DataError, match="line 1 is not the answer to prompt 1"):
        program(chatty, *file_of(chatty, [{"prompt": "A"}]), "--output", options[-1])
    options = file_of(chatty, [{"prompt": "A?"}])
    program(chatty, "--chat", *options, "--max-new-tokens", 2)
    assert answers_of(options) == [{"prompt": "A?", "completion": "ap", "num_tokens": 2, "stopped": "length"}]


def test_answers_of_two_models_or_settings_are_not_mixed(program, chatty, tmp_path):
    options = [chatty, "--chat", *file_of(tmp_path, [{"prompt": "A?"}, {"prompt": "B?"}]), "--max-new-tokens", "9"]
    program(*options)
    whole = options[5].read_bytes()
    options[5].write_bytes(whole[: whole.index(b"\n") + 1])
    other = tmp_path / "other"
    shutil.copytree(chatty, other)
    (tmp_path / "other.jinja").write_text(CHATML + " ")
    for changed, name in (
        ([other, *options[1:]], "model"),
        ([*options, "--seed", 1], "--seed"),
        ([*options, "--top-p", 0.5], "--top-p"),
        ([*options, "--max-new-tokens", 8], "--max-new-tokens"),
        ([*options, "--system", "S"], "--system"),
        ([*options, "--chat-template", tmp_path / "other.jinja"], "chat template hash"),
        ([chatty, *options[2:]], "chat template hash"),
    ):
        with pytest.raises(ConfigError, match=f"has answers made with {name} = .*name another output file"):
            program(*changed)
    program(*options, "--batch-size", 1)
    assert options[5].read_bytes() == whole


def test_a_run_is_known_by_its_checkpoint(workspace):
    config = run_config(workspace, steps=2)
    run_training(config)
    options = file_of(workspace, [{"prompt": "abc"}])
    assert tool("generate", config.run.dir, *options, "--max-new-tokens", 2).returncode == 0
    settings = json.loads(options[-1].with_name(options[-1].name + ".settings.json").read_text())
    assert settings["model"] == str(config.run.dir / "checkpoints/step_00000002")


def run_on_rank(arguments: list[str], stdin: str) -> str:
    """What this rank writes."""
    sys.stdin = io.StringIO(stdin)
    with redirect_stdout(io.StringIO()) as out:
        main(arguments)
    return out.getvalue()


def test_two_ranks_answer_as_one(chatty):
    command = [str(chatty), "--chat", "--temperature", "0", "--max-new-tokens", "60"]
    assert run_ranks(2, run_on_rank, command, "A?\nB?\n") == ["apple\npear\n", ""]
    options = [str(option) for option in file_of(chatty, [{"prompt": q} for q in ANSWERS])]
    assert run_ranks(2, run_on_rank, [*command, *options], "") == ["", ""]
    assert [answer["completion"] for answer in answers_of([Path(options[-1])])] == list(ANSWERS.values())
    with pytest.raises(RuntimeError, match="ConfigError: the chat template cannot render this conversation: no tools"):
        run_ranks(
            2, run_on_rank, [str(chatty), "--chat", "--prompt", "A?", "--chat-template", str(refusing(chatty))], ""
        )


class BrokenOutput(io.StringIO):
    """Fails at the second token."""

    def write(self, text: str) -> int:
        if self.getvalue().count("p"):
            raise ValueError("broken on purpose")
        return super().write(text)


def run_with_broken_output(arguments: list[str]) -> None:
    with redirect_stdout(BrokenOutput()):
        main(arguments)


def test_a_rank_that_fails_while_the_others_generate_does_not_wait_for_them(chatty):
    command = [str(chatty), "--chat", "--temperature", "0", "--max-new-tokens", "60", "--prompt", "A?"]
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 failed:.*broken on purpose"):
        run_ranks(2, run_with_broken_output, command, timeout_s=60)


def refusing(directory: Path) -> Path:
    """A template that refuses one question alone, so that its end of turn is found."""
    path = directory / "refusing.jinja"
    path.write_text("{% if messages[0].content == 'A?' %}{{ raise_exception('no tools') }}{% endif %}" + CHATML)
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", "nothing to generate"),
        ("--prompt x --max-new-tokens 0", "--max-new-tokens 0: expected at least 1"),
        ("--input x --output y --batch-size 0", "--batch-size 0: expected at least 1"),
        ("--input x", "--input (file of prompts) and --output (file for the answers) must be given together"),
        ("--output x", "--input (file of prompts) and --output (file for the answers) must be given together"),
        ("--input x --output y --prompt z", "--prompt and --input are both given"),
        ("--prompt x --system y", "add --chat"),
        ("--prompt x --chat-template y", "add --chat"),
        ("--prompt x --chat --bos", "--bos does not apply to --chat"),
        ("--input none.jsonl --output y", "cannot read the prompts in none.jsonl"),
        ("--chat --chat-template gpt", "chat template 'gpt'"),
        ("--chat --chat-template llama3", "the vocabulary lacks"),
        ("--prompt x --bos", "has no beginning-of-text token"),
    ],
)
def test_options_that_do_not_go_together(program, chatty, options, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        program(chatty, *options.split())


def test_answers_do_not_overwrite_their_prompts(program, chatty):
    options = file_of(chatty, [{"prompt": "A?"}])
    with pytest.raises(ConfigError, match="is the file of prompts"):
        program(chatty, *options[:3], options[1])


def test_a_tokenizer_without_a_template(program, chatty, tmp_path):
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chatty / file, tmp_path)
    with pytest.raises(ConfigError, match="comes with no chat template; name one with --chat-template: chatml"):
        program(tmp_path, "--chat")
    assert program(tmp_path, "--chat", "--chat-template", "chatml", "--prompt", "A?").out == "apple\n"


def test_what_cannot_be_generated_from(tmp_path):
    missing = tool("generate", tmp_path / "none", "--prompt", "x")
    assert missing.returncode == 66
    assert "no such checkpoint directory" in missing.stderr
    empty = tool("generate", tmp_path, "--prompt", "x")
    assert empty.returncode == 66
    assert "holds no checkpoint" in empty.stderr
    assert tool("generate", tmp_path, "--prompt", "x", "--top-p", 0).returncode == 64
    latin = tool("generate", tmp_path, "--prompt", b"\xe4".decode(errors="surrogateescape"))
    assert (latin.returncode, "--prompt is not UTF-8" in latin.stderr) == (64, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    done = tool("generate", tmp_path, "--prompt", "x", "--device", "cuda")
    assert done.returncode == 64
    assert "--device cuda: no GPU found on this machine" in done.stderr


@pytest.mark.parametrize(("terminal", "expected"), [(True, "a\\x1b[2J\té\n\n"), (False, "a\x1b[2J\té\n\n")])
def test_a_model_cannot_command_the_terminal(capsys, monkeypatch, terminal, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert _print(iter(["a\x1b[2J", "\té\n"])) == ["a\x1b[2J", "\té\n"]
    assert capsys.readouterr().out == expected


def test_ranks_that_do_not_connect_keep_who_reports_it(monkeypatch):
    """An error of the start says itself which rank prints it, which may be any."""
    error = PeerError("not all ranks have come")
    error.reported_elsewhere = True

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(generate, "init_distributed", fail)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(PeerError):
        main(["anything", "--prompt", "hi"])
    assert error.reported_elsewhere
