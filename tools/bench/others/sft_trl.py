"""Fine-tune with TRL's SFTTrainer on the CPU, one optimizer step per line on stdin, for tools/bench/sft.py.

This runs the trainer's loop, with its loader, loss, clipping and AdamW; a callback waits between steps, so that other
programs can run. A step is an epoch: all conversations, in as many microbatches as needed. Each step prints a JSON
line; the first line has versions and settings. Logging, checkpoints, reports and progress bars are off; the loss is
read from the trainer's log.

    echo | python sft_trl.py --model DIR --conversations FILE.json --mode padded
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

BATCH = {"padded": 4, "single": 1, "packed": 1}  # sequences per microbatch; 8 padded and 2 packed are slower on a CPU
FIXED = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "gradient_accumulation_steps": 1_000_000,
    "num_train_epochs": 1_000_000, "optim": "adamw_torch_fused", "adam_beta1": 0.9, "adam_beta2": 0.95,
    "adam_epsilon": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0, "lr_scheduler_type": "constant",
    "train_sampling_strategy": "group_by_length", "dataloader_num_workers": 0, "save_strategy": "no",
    "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip
VERSIONS = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
HOW = "grouped by length, sdpa, eager, no checkpointing, fused AdamW, no loader workers"


class CountingTrainer(SFTTrainer):
    """Counts the positions of all microbatches of a step, and the targets among them."""

    places = targets = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.places += inputs["input_ids"].numel()
        self.targets += int((inputs["labels"][:, 1:] != -100).sum())
        return super().training_step(model, inputs, *args, **kwargs)


class StepOnRequest(TrainerCallback):
    """Runs a step per line on stdin; the time from the line to the loss includes loading."""

    def __init__(self) -> None:
        self.trainer: CountingTrainer | None = None
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" not in logs or self.trainer is None:  # the final summary
            return
        seconds, trainer = time.perf_counter() - self.started, self.trainer
        line = {"seconds": seconds, "loss": logs["loss"], "places": trainer.places, "targets": trainer.targets}
        print(json.dumps(line), flush=True)
        self._wait(control)

    def _wait(self, control: Any) -> None:
        control.should_training_stop = not sys.stdin.readline()
        if self.trainer is not None:
            self.trainer.places = self.trainer.targets = 0
        self.started = time.perf_counter()


def main() -> None:
    args = _arguments()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(args, folder)
        print(f"{VERSIONS}; microbatches of {args.batch}, {HOW}", flush=True)
        trainer.train()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory with a tokenizer")
    parser.add_argument("--conversations", type=Path, required=True, help='JSON: {"ids": [[...]], "targets": [[...]]}')
    parser.add_argument("--mode", choices=BATCH, required=True)
    parser.add_argument("--batch", type=int, help=f"sequences per microbatch (default: {BATCH})")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.batch = args.batch or BATCH[args.mode]
    return args


def _trainer(args: argparse.Namespace, folder: str) -> CountingTrainer:
    settings = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        max_length=args.seq_length,
        packing=args.mode == "packed",
        packing_strategy="bfd",
        **FIXED,
    )
    read = json.loads(args.conversations.read_text(encoding="utf-8"))
    step = StepOnRequest()
    step.trainer = CountingTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa"),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": read["ids"], "assistant_masks": read["targets"]}),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[step],
    )
    step.trainer.remove_callback(PrinterCallback)
    return step.trainer


if __name__ == "__main__":
    main()
