"""Continue a text with a trained model.

    python tools/generate.py runs/quickstart --prompt 'def main(' --max-new-tokens 64

DIR is a run directory (its newest checkpoint is taken), a checkpoint, or a Hugging Face directory. The text appears as
it is written; speed goes to stderr.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from engine.checkpoint.load import load_decoder
from engine.data.tokenizer import stream_text
from engine.errors import ConfigError, run_program
from engine.model.generate import Sampling, generate
from engine.parallel.layout import choose_device


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Continue a text with a trained model.",
        epilog="DIR: a run directory (its newest checkpoint), a checkpoint, or a Hugging Face directory.",
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="where the model is")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; `-` reads it from stdin")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--bos", action="store_true", help="begin with the beginning-of-text token, for models that want it"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    options = parser.parse_args()
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {options.max_new_tokens}: expected at least 1")
    sampling = Sampling(options.temperature, options.top_p, options.seed)

    prompt = _prompt(options.prompt)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine shows no GPU; use --device cpu, or auto")
    device = choose_device(options.device, local_rank=0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder, tokenizer = load_decoder(options.dir, dtype, device)
    ids = tokenizer.encode(prompt)
    if options.bos:
        if tokenizer.bos_id is None:
            raise ConfigError(f"--bos: the {tokenizer.kind} tokenizer of {options.dir} has no beginning-of-text token")
        ids = [tokenizer.bos_id, *ids]

    stop = frozenset({tokenizer.eod_id})
    new = generate(decoder, ids, options.max_new_tokens, sampling, stop, tokenizer.vocab_size)
    started, texts = time.perf_counter(), 0
    for text in stream_text(tokenizer, itertools.chain(ids, new)):  # one for each id, and a last one
        print(text, end="", flush=True)
        texts += 1
    count, seconds = texts - 1 - len(ids), time.perf_counter() - started
    print(f"\n{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)


def _prompt(option: str) -> str:
    try:
        text = sys.stdin.read() if option == "-" else option
        text.encode()
    except UnicodeError as error:
        raise ConfigError(f"--prompt is not UTF-8: {error}") from None
    return text


if __name__ == "__main__":
    run_program(main)
