"""The quickstart: train a small language model on Python's standard library, then fine-tune it to answer questions.

Started by examples/quickstart.sh. Each stage prints a description and its commands, so that they can be repeated by
hand; all output is in data/quickstart and runs/quickstart.
"""

import ast
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

DATA = Path("data/quickstart")
RUN, TWIN, EXPORT = Path("runs/quickstart"), Path("runs/quickstart-twin"), Path("runs/quickstart-hf")
TUNED, TUNED_EXPORT = Path("runs/quickstart-sft"), Path("runs/quickstart-sft-hf")
CONFIG, TUNING = "examples/configs/quickstart.yaml", "examples/configs/quickstart_sft.yaml"
STAGES, STEPS = 11, 480
VOCAB_SIZE = 512
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip"}
PROMPT = "def main(args):\n"
QUESTION = "What does `json.dumps` do?"


def main() -> None:
    """Run all stages, starting from empty directories; exit with an error at the first one that fails."""
    started = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks; torchrun would also set it, with a warning
    for leftover in (RUN, TWIN, EXPORT, TUNED, TUNED_EXPORT, DATA):
        shutil.rmtree(leftover, ignore_errors=True)
    with stage(1, "Corpus: the sources of Python's standard library, which every machine has"):
        collect_corpus()
    with stage(2, f"Tokenizer: learn {VOCAB_SIZE} pieces of words from the corpus"):
        triaxis(
            "tokenizer",
            "--input",
            DATA / "stdlib.jsonl",
            "--vocab-size",
            VOCAB_SIZE,
            "--output",
            DATA / "tokenizer",
        )
    with stage(3, "Preprocessing: text to token ids in a memory-mapped dataset"):
        triaxis(
            "preprocess", "--input", DATA / "stdlib.jsonl", "--tokenizer-model", DATA / "tokenizer.model",
            "--append-eod", "--workers", 2, "--output-prefix", DATA / "stdlib",
        )  # fmt: skip
    with stage(4, f"Pretraining on 4 ranks (tensor 2 × pipeline 2), interrupted after step {STEPS // 2} with SIGTERM"):
        train(RUN, stop_after=STEPS // 2)
    with stage(5, "The same command again resumes where it stopped, and evaluates on text it has never seen"):
        train(RUN)
        report_validation()
    with stage(6, "Proof: a twin that was never interrupted has bitwise the same losses"):
        train(TWIN, log=Path("runs/quickstart-twin.log"))
        compare_losses()
    with stage(7, "Export to Hugging Face format; transformers must give the same logits"):
        triaxis("convert", "--from", RUN, "--to", EXPORT, "--dtype", "fp32")
        compare_logits()
    with stage(8, "Generation: the model continues a line of Python"):
        triaxis("generate", EXPORT, "--prompt", PROMPT, "--max-new-tokens", 96, "--temperature", 0.7)
    with stage(9, "Fine-tuning on 4 ranks (tensor 2 × data 2): questions and answers out of the library's docstrings"):
        collect_questions()
        triaxis(
            "preprocess", "--task", "sft", "--input", DATA / "questions.jsonl", "--chat-template", "llama2",
            "--tokenizer-model", DATA / "tokenizer.model", "--max-length", 257, "--on-too-long", "drop",
            "--workers", 2, "--output-prefix", DATA / "questions",
        )  # fmt: skip
        triaxis("train", TUNING, "--ranks", 4)
        report_tuning()
    with stage(10, "A question to the fine-tuned model, and to its export by transformers"):
        triaxis("chat", TUNED, "--prompt", QUESTION, "--max-new-tokens", 96, "--temperature", 0)
        triaxis("convert", "--from", TUNED, "--to", TUNED_EXPORT, "--dtype", "fp32")
        ask_transformers()
    with stage(11, "Picture of the loss"):
        plot()
    print(f"\nDone in {time.perf_counter() - started:.0f} s. The models are in {EXPORT} and {TUNED_EXPORT}.")
    print(f"Let them write: triaxis generate {RUN} --prompt 'import '; triaxis chat {TUNED}")


@contextmanager
def stage(number: int, title: str) -> Iterator[None]:
    """Print a stage's title, and afterwards the seconds that it took."""
    print(f"\n=== {number}/{STAGES}  {title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"    took {time.perf_counter() - started:.1f} s", flush=True)


def collect_corpus() -> None:
    """Write one JSON line per module, in an order that mixes packages, so that the held-out part is not just one."""
    DATA.mkdir(parents=True)
    documents = num_bytes = 0
    with (DATA / "stdlib.jsonl").open("w", encoding="utf-8") as file:
        for path, text in modules():
            file.write(json.dumps({"text": text, "path": str(path)}) + "\n")
            documents, num_bytes = documents + 1, num_bytes + len(text)
    print(f"    {documents} modules, {num_bytes / 1e6:.1f} MB -> {DATA / 'stdlib.jsonl'}")


def modules() -> Iterator[tuple[Path, str]]:
    """Yield path and source of the library's modules."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = LEFT_OUT | {"site-packages", "dist-packages", "__pycache__"}
    paths = [path.relative_to(root) for path in root.rglob("*.py") if not left_out & set(path.parts)]
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path).encode()).digest()):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield path, text


def collect_questions() -> None:
    """Write a question for each function and class of the library, answered by the first paragraph of its docstring."""
    count = 0
    with (DATA / "questions.jsonl").open("w", encoding="utf-8") as file:
        for path, text in modules():
            module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            for name, answer in documented(ast.parse(text), module):
                turns = [("user", f"What does `{name}` do?"), ("assistant", answer)]
                messages = [{"role": role, "content": content} for role, content in turns]
                file.write(json.dumps({"messages": messages}) + "\n")
                count += 1
    print(f"    {count} questions and answers -> {DATA / 'questions.jsonl'}")


def documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the names of functions and classes with the first paragraph of their docstrings."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{child.name}"
        if paragraph := " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split()):
            yield name, paragraph
        if isinstance(child, ast.ClassDef):
            yield from documented(child, name)


def triaxis(*arguments: object) -> None:
    """Run the command `triaxis`."""
    run(["triaxis", *map(str, arguments)])


def run(command: list[str], log: Path | None = None) -> None:
    """Run a command, with its output in `log` if there is one; exit if it fails."""
    show(command, log)
    with log.open("w") if log else nullcontext() as output:
        code = subprocess.run(command, stdout=output, stderr=output).returncode
    if code:
        sys.exit(f"quickstart: this command ended with exit code {code}; {log or 'the message above'} says why")


def show(command: list[str], log: Path | None = None) -> None:
    """Print a command so that it can be copied into a shell."""
    print(f"    $ {shlex.join(command)}{f' &> {log}' if log else ''}", flush=True)


def train(directory: Path, stop_after: int | None = None, log: Path | None = None) -> None:
    """Train on four ranks. Send SIGTERM once step `stop_after` is recorded; redirect the output to `log`, if given."""
    command = ["triaxis", "train", CONFIG, "--ranks", "4", "--run.dir", str(directory), "--train.steps", str(STEPS)]
    if stop_after is None:
        return run(command, log)
    show(command)
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and max(losses(directory), default=0) < stop_after:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        process.kill()
    if code != 75:
        sys.exit(f"quickstart: the interrupted run should have saved and ended with code 75, but has {code}")
    print(f"    interrupted after step {max(losses(directory))}; ended with code 75: saved, start me again")


def records(path: Path) -> list[dict]:
    """Read the complete lines of a JSONL file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(directory: Path, key: str = "loss") -> dict[int, float]:
    """Return the loss by step."""
    return {record["step"]: record[key] for record in records(directory / "metrics.jsonl") if key in record}


def report_validation() -> None:
    """Print the first and the last validation loss (nats per token); exit if it fell by less than half."""
    values = losses(RUN, "eval_loss")
    first, last = values[min(values)], values[max(values)]
    uniform = math.log(VOCAB_SIZE)
    print(f"    validation loss {first:.3f} (guessing: {uniform:.3f}) -> {last:.3f}, {last / first:.1%} of its start")
    if last >= first / 2:
        sys.exit("quickstart: the validation loss should have fallen by more than half")


def report_tuning() -> None:
    """Print the loss on held-out answers before fine-tuning and at its best; exit if it fell by less than a quarter."""
    values = losses(TUNED, "eval_loss")
    first, best = values[0], min(values.values())
    print(f"    loss on answers it has never seen: {first:.3f} before, {best:.3f} at best")
    if best >= 0.75 * first:
        sys.exit("quickstart: the loss on answers should have fallen by more than a quarter")


def ask_transformers() -> None:
    """Ask transformers the same question, with the chat template and end of turn of the export."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import transformers

    transformers.logging.disable_progress_bar()
    pipe = transformers.pipeline("text-generation", model=str(TUNED_EXPORT))
    reply = pipe([{"role": "user", "content": QUESTION}], max_new_tokens=96, do_sample=False)
    print(f"    transformers: {reply[0]['generated_text'][-1]['content']}")


def compare_losses() -> None:
    """Exit unless the interrupted run and its twin have bitwise the same losses up to the last step."""
    interrupted, whole = losses(RUN), losses(TWIN)
    if interrupted != whole or max(whole) != STEPS:
        different = [step for step in whole if interrupted.get(step) != whole[step]]
        sys.exit(f"quickstart: the losses differ at steps {different}")
    print(f"    all {len(whole)} recorded losses, of steps {min(whole)} to {STEPS}, are equal to the last bit")


def compare_logits() -> None:
    """Compare the logits of the exported model in transformers with ours, on a text of the corpus."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    import transformers

    from engine.checkpoint.load import load_decoder
    from engine.model.attention import attend_within

    decoder, tokenizer = load_decoder(RUN, torch.float32, torch.device("cpu"))
    text = Path(json.__file__).read_text(encoding="utf-8")[:1500]
    ids = tokenizer.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(EXPORT)
    if theirs(text, add_special_tokens=False)["input_ids"] != ids:
        sys.exit("quickstart: the exported tokenizer gives other ids")
    model = transformers.AutoModelForCausalLM.from_pretrained(EXPORT, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), attend_within((0, len(ids)), None))
        difference = (decoder.logits(hidden) - expected).abs().max().item()
    print(f"    {len(ids)} tokens, same ids; largest difference of a logit: {difference:.1e}")
    if difference > 1e-4:
        sys.exit("quickstart: the logits should agree within 1e-4")


def plot() -> None:
    """Draw training and validation loss over steps into runs/quickstart/loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    training, validation = losses(RUN), losses(RUN, "eval_loss")
    axes.plot(training.keys(), training.values(), linewidth=0.7, alpha=0.6, label="training")
    axes.plot(validation.keys(), validation.values(), "o-", label="validation")
    stopped = next(record["step"] for record in records(RUN / "events.jsonl") if record["event"] == "resume")
    axes.axvline(stopped, color="gray", linestyle="--", label=f"interrupted and resumed at step {stopped}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Quickstart: 1 M parameters learn Python")
    axes.legend()
    figure.savefig(RUN / "loss.png", dpi=120)
    print(f"    {RUN / 'loss.png'}")


if __name__ == "__main__":
    main()
