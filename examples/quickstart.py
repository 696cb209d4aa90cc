"""The quickstart: train a small language model on Python's standard library, then fine-tune it to answer questions.

Started by examples/quickstart.sh. Each stage prints a description, how long it will take, and its commands, so that
they can be repeated by hand; all output is in data/quickstart and runs/quickstart*.
"""

import ast
import hashlib
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

DATA = Path("data/quickstart")
RUN, TWIN, EXPORT = Path("runs/quickstart"), Path("runs/quickstart-twin"), Path("runs/quickstart-hf")
TUNED, TUNED_EXPORT = Path("runs/quickstart-sft"), Path("runs/quickstart-sft-hf")
CONFIG, TUNING = "examples/configs/quickstart.yaml", "examples/configs/quickstart_sft.yaml"
EXPECTED_S = (1, 2, 1, 18, 65, 20, 8, 3, 23, 8, 1)  # seconds of each stage on two cores
INTERRUPTED, COMPARED = 40, 80  # the step of the interruption, and the step up to which the twin runs
VOCAB_SIZE, NUM_QUESTIONS = 512, 3000
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip"}
PROMPT = "def main(args):\n"
QUESTION = "What does `json.dumps` do?"
NEXT = (  # printed at the end: arguments of `triaxis`, and what they do
    (("generate", RUN, "--prompt", "import "), "write more Python"),
    (("chat", TUNED), "ask more questions"),
    (("inspect", DATA / "questions_sft", "--tokenizer", DATA / "tokenizer.model", "--sample", 0), "see what it read"),
    (("train", CONFIG, "--ranks", 4, "--run.dir", "runs/longer", "--train.steps", 2000), "train a better one"),
)


def main() -> None:
    """Run all stages, starting from empty directories; exit with an error at the first one that fails."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks; torchrun would also set it, with a warning
    for leftover in (RUN, TWIN, EXPORT, TUNED, TUNED_EXPORT, DATA):
        shutil.rmtree(leftover, ignore_errors=True)
    times: list[tuple[float, float]] = []
    print(f"{len(EXPECTED_S)} stages, about {sum(EXPECTED_S) / 60:.0f} minutes on two free cores", flush=True)
    with stage(times, "Corpus: the sources of Python's standard library, which every machine has"):
        collect_corpus()
    with stage(times, f"Tokenizer: learn {VOCAB_SIZE} pieces of words from the corpus"):
        triaxis(
            "tokenizer", "--input", DATA / "stdlib.jsonl", "--vocab-size", VOCAB_SIZE, "--output", DATA / "tokenizer",
        )  # fmt: skip
    with stage(times, "Preprocessing: text to token ids in a memory-mapped dataset"):
        triaxis(
            "preprocess", "--input", DATA / "stdlib.jsonl", "--tokenizer-model", DATA / "tokenizer.model",
            "--append-eod", "--workers", 2, "--output-prefix", DATA / "stdlib",
        )  # fmt: skip
    with stage(times, f"Pretraining on 4 ranks (tensor 2 × pipeline 2), interrupted after step {INTERRUPTED}"):
        train(RUN, stop_after=INTERRUPTED)
    with stage(times, "The same command again resumes where it stopped, and evaluates on text it has never seen"):
        train(RUN)
        report_validation()
    with stage(times, f"Proof: a twin that runs to step {COMPARED} without interruption has bitwise the same losses"):
        train(TWIN, stop_after=COMPARED, log=Path("runs/quickstart-twin.log"))
        compare_losses()
    with stage(times, "Export to Hugging Face format; transformers must give the same logits"):
        triaxis("convert", "--from", RUN, "--to", EXPORT, "--dtype", "fp32")
        compare_logits()
    with stage(times, "Generation: the model continues a line of Python"):
        triaxis("generate", EXPORT, "--prompt", PROMPT, "--max-new-tokens", 96, "--temperature", 0.5)
    with stage(times, "Fine-tuning on 2 ranks (data parallel): questions, answered by the library's docstrings"):
        collect_questions()
        triaxis(
            "preprocess", "--task", "sft", "--input", DATA / "questions.jsonl", "--chat-template", "llama2",
            "--tokenizer-model", DATA / "tokenizer.model", "--max-length", 257, "--on-too-long", "drop",
            "--workers", 2, "--output-prefix", DATA / "questions",
        )  # fmt: skip
        triaxis("train", TUNING, "--ranks", 2)
        report_tuning()
    with stage(times, "A question to the fine-tuned model, and to its export by transformers"):
        triaxis("chat", TUNED, "--prompt", QUESTION, "--max-new-tokens", 96, "--temperature", 0)
        triaxis("convert", "--from", TUNED, "--to", TUNED_EXPORT, "--dtype", "fp32")
        ask_transformers()
    with stage(times, "Picture of the loss"):
        plot()
    print_times(times)
    print_next()


@contextmanager
def stage(times: list[tuple[float, float]], title: str) -> Iterator[None]:
    """Print a stage's title with the seconds that it may take, and afterwards those that it took.

    `times` has wall and CPU seconds of the stages before; it gets those of this one.
    """
    number, wall, cpu = len(times) + 1, time.perf_counter(), cpu_seconds()
    expected = EXPECTED_S[number - 1] * pace([seconds for seconds, _ in times])
    print(f"\n=== {number}/{len(EXPECTED_S)}  {title} (about {max(1, expected):.0f} s)", flush=True)
    yield
    times.append((time.perf_counter() - wall, cpu_seconds() - cpu))
    print(f"    took {times[-1][0]:.1f} s", flush=True)


def pace(seconds: list[float]) -> float:
    """How much slower this machine is than the one of `EXPECTED_S`: 1 until there are stages to judge by."""
    expected = sum(EXPECTED_S[: len(seconds)])
    return sum(seconds) / expected if expected >= 5 else 1.0


def cpu_seconds() -> float:
    """CPU time of this process and of the commands that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def print_times(times: list[tuple[float, float]]) -> None:
    """Print wall and CPU time of each stage."""
    print("\nstage  seconds  CPU seconds")
    rows = [*enumerate(times, 1), ("all", tuple(map(sum, zip(*times, strict=True))))]
    for name, (wall, cpu) in rows:
        print(f"{name:>5}  {wall:7.1f}  {cpu:11.1f}")


def print_next() -> None:
    """Print where the results are, and the commands of `NEXT`."""
    print(
        f"\nLook at {RUN / 'loss.png'}, {RUN / 'metrics.jsonl'}, and the models in {EXPORT} and {TUNED_EXPORT}. Then:"
    )
    if Path(os.environ.get("VIRTUAL_ENV", "")) == Path.cwd() / ".venv":
        print(f"    {'have the command':24}. .venv/bin/activate")
    for arguments, purpose in NEXT:
        print(f"    {purpose:24}{shlex.join(['triaxis', *map(str, arguments)])}")
    print("README.md shows the same steps with a text of your own.")


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
    """Write questions about functions and classes of the library, answered by the first paragraph of the docstring."""
    with (DATA / "questions.jsonl").open("w", encoding="utf-8") as file:
        for name, answer in islice(questions(), NUM_QUESTIONS):
            turns = [("user", f"What does `{name}` do?"), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    print(f"    {NUM_QUESTIONS} questions and answers -> {DATA / 'questions.jsonl'}")


def questions() -> Iterator[tuple[str, str]]:
    """Yield what `documented` finds in the library, module by module."""
    for path, text in modules():
        yield from documented(ast.parse(text), ".".join(path.with_suffix("").parts).removesuffix(".__init__"))


def documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the names of functions and classes in `node`, with the first paragraph of their docstrings."""
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


def run(command: list[str]) -> None:
    """Run a command; exit if it fails."""
    show(command)
    if code := subprocess.run(command).returncode:
        sys.exit(f"quickstart: this command ended with exit code {code}; the message above says why")


def show(command: list[str], log: Path | None = None) -> None:
    """Print a command so that it can be copied into a shell."""
    print(f"    $ {shlex.join(command)}{f' &> {log}' if log else ''}", flush=True)


def train(directory: Path, stop_after: int | None = None, log: Path | None = None) -> None:
    """Train on four ranks. Send SIGTERM once step `stop_after` is recorded; redirect the output to `log`, if given."""
    command = ["triaxis", "train", CONFIG, "--ranks", "4", "--run.dir", str(directory)]
    if stop_after is None:
        return run(command)
    show(command, log)
    with log.open("w") if log else nullcontext() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while process.poll() is None and max(losses(directory), default=0) < stop_after:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        process.kill()
    if code != 75:
        sys.exit(f"quickstart: the interrupted run should have saved and ended with code 75, but has {code}")
    print(f"    SIGTERM after step {max(losses(directory))}; ended with code 75: saved, start me again")


def records(path: Path) -> list[dict]:
    """Read the complete lines of a JSONL file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(directory: Path, key: str = "loss") -> dict[int, float]:
    """Return the loss by step."""
    return {record["step"]: record[key] for record in records(directory / "metrics.jsonl") if key in record}


def resume_step() -> int:
    """Return the step from which the interrupted run resumed."""
    return next(record["step"] for record in records(RUN / "events.jsonl") if record["event"] == "resume")


def report_validation() -> None:
    """Print the first and the last validation loss (nats per token); exit if it fell by less than 40 %."""
    values = losses(RUN, "eval_loss")
    first, last = values[min(values)], values[max(values)]
    uniform = math.log(VOCAB_SIZE)
    print(f"    validation loss {first:.3f} (guessing: {uniform:.3f}) -> {last:.3f}, {last / first:.1%} of its start")
    if last >= 0.6 * first:
        sys.exit("quickstart: the validation loss should have fallen by more than 40 %")


def report_tuning() -> None:
    """Print the loss on held-out answers before fine-tuning and at its best; exit if it fell by less than a tenth."""
    values = losses(TUNED, "eval_loss")
    first, best = values[0], min(values.values())
    print(f"    loss on answers it has never seen: {first:.3f} before, {best:.3f} at best")
    if best >= 0.9 * first:
        sys.exit("quickstart: the loss on answers should have fallen by more than a tenth")


def ask_transformers() -> None:
    """Ask transformers the same question, with the chat template and end of turn of the export."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import transformers

    transformers.logging.disable_progress_bar()
    pipe = transformers.pipeline("text-generation", model=str(TUNED_EXPORT))
    reply = pipe([{"role": "user", "content": QUESTION}], max_new_tokens=96, do_sample=False)
    print(f"    transformers: {reply[0]['generated_text'][-1]['content']}")


def compare_losses() -> None:
    """Exit unless the twin has bitwise the losses of the resumed run, before the interruption and after it.

    The gradient norms are compared as well: they depend on every weight.
    """
    (resumed, resumed_norms), (whole, norms) = [(losses(run), losses(run, "grad_norm")) for run in (RUN, TWIN)]
    if different := [at for at in whole if (resumed.get(at), resumed_norms.get(at)) != (whole[at], norms[at])]:
        sys.exit(f"quickstart: the losses or gradient norms differ at steps {different}")
    after = [step for step in whole if step > resume_step()]
    if not after:
        sys.exit(f"quickstart: the twin's last step, {max(whole)}, is not behind the interruption at {resume_step()}")
    count = f"{len(whole)} recorded losses and gradient norms"
    print(f"    all {count} are equal to the last bit; {len(after)} of them come after the resume")


def compare_logits() -> None:
    """Compare the logits of the exported model in transformers with ours, on a text of the corpus."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    import transformers

    from engine.checkpoint.load import load_decoder

    decoder, tokenizer = load_decoder(RUN, torch.float32, torch.device("cpu"))
    text = Path(json.__file__).read_text(encoding="utf-8")[:1500]
    ids = tokenizer.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(EXPORT)
    if theirs(text, add_special_tokens=False)["input_ids"] != ids:
        sys.exit("quickstart: the exported tokenizer gives other ids")
    model = transformers.AutoModelForCausalLM.from_pretrained(EXPORT, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), decoder.attend_within((0, len(ids))))
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
    label = f"interrupted and resumed at step {resume_step()}"
    axes.axvline(resume_step(), color="gray", linestyle="--", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Quickstart: half a million parameters learn Python")
    axes.legend()
    figure.savefig(RUN / "loss.png", dpi=120)
    print(f"    {RUN / 'loss.png'}")


if __name__ == "__main__":
    main()
