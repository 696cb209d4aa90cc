"""Translates the arguments of Megatron-LM into a configuration, and notes what differs.

What makes another model or another kind of run is refused; what changes the training, has no counterpart or needs no
setting is noted. Names and reasons are those of `engine/config/foreign.py`.
"""

from pathlib import Path
from typing import Any

from engine.cli.megatron.arguments import DEFAULT_SPLIT, Arguments, flag
from engine.cli.megatron.model import translate_model
from engine.cli.megatron.notes import Notes
from engine.config.foreign import explain
from engine.errors import ConfigError

_OTHER_RUNS = ("yaml_cfg", "data_args_path", "per_split_data_args_path", "use_checkpoint_args", "skip_train", "sft",
               "perform_rl_step", "fim_data")  # fmt: skip
_KINDS = {"constant": "constant", "linear": "linear", "cosine": "cosine", "WSD": "wsd"}  # of lr_decay_style
_MODEL_FILES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer")


def translate(arguments: Arguments) -> tuple[dict[str, Any], Notes]:
    """Translate into a configuration as nested mappings, for `engine.config.load.resolve`.

    Raises:
        ConfigError: there is no translation; with every reason.
    """
    a, notes = arguments, Notes()
    notes.refused += [
        f"{a.shown(name)}: {explain(name) or 'not implemented'}" for name in _OTHER_RUNS if a.switch(name)
    ]
    batch = _batch(a, notes)
    steps = _steps(a, notes, batch["global"])
    data = _data(a, notes)
    config = {
        "run": _run(a, notes),
        "model": translate_model(a, notes),
        "parallel": _parallel(a, notes),
        "precision": _precision(a, notes),
        "data": data,
        "batch": batch,
        "optimizer": _optimizer(a, notes),
        "lr_schedule": _schedule(a, notes, steps, batch["global"]),
        "train": {"steps": steps, **_evaluation(a, has_valid="valid" in data or data["split"][1] > 0)},
        "checkpoint": _checkpoint(a, notes),
        "log": {"interval": a.integer("log_interval"), "tensorboard": "tensorboard_dir" in a.given},
    }
    if notes.refused:
        reasons = "\n  ".join(notes.refused)
        raise ConfigError(f"Triaxis cannot run what these arguments of Megatron-LM say:\n  {reasons}")
    notes.add_rest(a)
    return {name: section for name, section in config.items() if section}, notes


def _run(a: Arguments, notes: Notes) -> dict[str, Any]:
    for name in ("load", "pretrained_checkpoint"):
        if name == "load" and a.text("load") is not None and a.text("load") == a.text("save"):
            notes.implied.append(
                f"{a.shown(name)}: run.resume = auto resumes from run.dir, not from Megatron-LM's files"
            )
        elif a.text(name) is not None:
            notes.todo.append(
                f"{a.shown(name)}: checkpoints of Megatron-LM are not read; for its weights, export them to a Hugging "
                "Face directory with Megatron-Bridge and set model.from_hf"
            )
    run = {"dir": a.text("save")} if a.text("save") else {}
    return run | {"seed": a.integer("seed")} | ({"deterministic": True} if a.switch("deterministic_mode") else {})


def _batch(a: Arguments, notes: Notes) -> dict[str, int]:
    micro, total = a.required("micro_batch_size", notes.refused), a.integer("global_batch_size")
    schedule = " ".join(a.values("step_batch_size_schedule")).split()  # THRESHOLD:SIZE, increasing
    if total is None and schedule and (last := schedule[-1].partition(":")[2]).isdecimal():
        total = int(last)
    for name in ("rampup_batch_size", "step_batch_size_schedule"):
        if a.switch(name):
            notes.changed.append(f"{a.shown(name)}: {explain(name)}")
    model_size = 1
    for axis in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        model_size *= a.required(axis, notes.refused)
    if total is None and a.gpus:
        total = micro * (a.gpus * a.nodes // model_size)  # Megatron-LM's default: one microbatch
    if total is None or total < 1:
        notes.refused.append(
            f"{flag('global_batch_size')}: missing or not positive; its default, micro-batch × data-parallel ranks, "
            "follows from torchrun --nproc-per-node N before the arguments"
        )
    return {"micro": micro, "global": max(total or 1, 1)}


def _steps(a: Arguments, notes: Notes, batch: int) -> int:
    steps, samples = a.integer("train_iters"), a.integer("train_samples")
    if not steps and not samples:
        notes.refused.append("--train-iters or --train-samples: missing; train.steps needs one of them")
    return int(steps or (samples or batch) // batch)


def _schedule(a: Arguments, notes: Notes, steps: int, batch: int) -> dict[str, Any]:
    """The schedule in steps; Megatron-LM counts it in samples, so that it may be given in either."""

    def given(what: str) -> int | None:
        samples, iters = a.integer(f"lr_{what}_samples"), a.integer(f"lr_{what}_iters")
        return iters or (samples // batch if samples else None)

    style, fraction, decay = a.text("lr_decay_style"), a.real("lr_warmup_fraction"), given("decay") or steps
    warmup, wsd_decay, wsd_style = given("warmup") or 0, given("wsd_decay"), a.text("lr_wsd_decay_style")
    if style not in _KINDS:
        notes.refused.append(f"{a.shown('lr_decay_style')}: not implemented; {', '.join(_KINDS)}")
    if decay != steps and style != "constant":
        shown = a.shown("lr_decay_iters" if a.switch("lr_decay_iters") else "lr_decay_samples")
        notes.changed.append(f"{shown}: the decay ends at step {decay} there, and here at train.steps = {steps}")
    if style == "WSD" and wsd_style != "linear":
        notes.changed.append(f"{a.shown('lr_wsd_decay_style')}: the decay of lr_schedule.kind = wsd is linear")
    if style == "WSD" and not wsd_decay:
        notes.todo.append(
            f"no {flag('lr_wsd_decay_iters')}: set lr_schedule.decay_steps; by default a tenth of the run"
        )
    if a.real("lr_warmup_init"):
        notes.changed.append(f"{a.shown('lr_warmup_init')}: warmup starts from 0 here")
    schedule = {"kind": _KINDS.get(style, "linear"), "min_lr": a.real("min_lr")}
    schedule["warmup_steps"] = round(fraction * decay) if fraction else warmup
    return schedule | ({"decay_steps": wsd_decay} if style == "WSD" and wsd_decay else {})


def _optimizer(a: Arguments, notes: Notes) -> dict[str, Any]:
    if a.text("optimizer") != "adam":
        notes.refused.append(f"{a.shown('optimizer')}: {explain('optimizer')}")
    if a.switch("lr") is False:
        notes.refused.append(f"{flag('lr')}: missing; optimizer.lr needs it")
    optimizer = {
        "lr": a.real("lr") or 1.0,
        "weight_decay": a.real("weight_decay"),
        "betas": [a.real("adam_beta1"), a.real("adam_beta2")],
        "eps": a.real("adam_eps"),
        "clip_grad": a.real("clip_grad"),
    }
    dtypes = {a.text("exp_avg_dtype"), a.text("exp_avg_sq_dtype")}
    if dtypes == {"bf16"} and optimizer["betas"][1] <= 0.99:
        optimizer["moments"] = "bf16"
    elif dtypes != {"fp32"}:
        shown = a.shown("exp_avg_dtype", "exp_avg_sq_dtype")
        notes.changed.append(f"{shown}: both moments are fp32 here, or both bf16 with betas[1] of at most 0.99")
    return optimizer


def _parallel(a: Arguments, notes: Notes) -> dict[str, Any]:
    tp, pp = a.integer("tensor_model_parallel_size"), max(a.integer("pipeline_model_parallel_size"), 1)
    layers, per_chunk = a.integer("num_layers") or 1, a.integer("num_layers_per_virtual_pipeline_stage")
    chunks = a.integer("num_virtual_stages_per_pipeline_rank") or (layers // pp // per_chunk if per_chunk else 1)
    first, last = a.integer("decoder_first_pipeline_num_layers"), a.integer("decoder_last_pipeline_num_layers")
    parallel: dict[str, Any] = {"tp": tp, "pp": pp}
    if chunks > 1:
        parallel |= {"schedule": "interleaved", "virtual_stages": chunks}
    if first is not None or last is not None:
        if chunks == 1 and (stages := _layers_per_stage(layers, pp, first, last)):
            parallel["layers_per_stage"] = stages
        else:
            notes.refused.append(
                f"{a.shown('decoder_first_pipeline_num_layers', 'decoder_last_pipeline_num_layers')}: does not divide "
                f"{layers} layers over {pp} stages × {chunks} chunks; leave it out, and layers are divided by cost"
            )
    if a.switch("grad_reduce_in_bf16"):
        parallel["grad_reduce_dtype"] = "bf16"
    if a.switch("fp8_param_gather") and a.text("fp8_format") and a.text("fp8_recipe") != "blockwise":
        parallel["fp8_param_gather"] = True
    if a.switch("distributed_timeout_minutes"):
        parallel["timeout_s"] = 60 * a.integer("distributed_timeout_minutes")
    if not a.switch("use_distributed_optimizer"):
        notes.implied.append(f"no {flag('use_distributed_optimizer')}: parallel.sharded_optimizer is true by default; "
                             "the results are the same")  # fmt: skip
    if (cp := a.integer("context_parallel_size")) > 1:
        notes.left_out.append(f"{a.shown('context_parallel_size')}: {explain('context_parallel_size')}; "
                              f"data parallelism has {cp} times the ranks")  # fmt: skip
    return parallel | _recompute(a, notes)


def _layers_per_stage(layers: int, pp: int, first: int | None, last: int | None) -> list[int] | None:
    """Layers of the stages if the first or the last has this many, and the others equal shares; None: impossible."""
    ends = [number for number in (first, last) if number is not None]
    between = pp - len(ends)
    rest = layers - sum(ends)
    if rest < 0 or between < 0 or (rest % between if between else rest):
        return None
    return [*ends[: first is not None], *[rest // between if between else 0] * between, *ends[first is not None :]]


def _recompute(a: Arguments, notes: Notes) -> dict[str, Any]:
    granularity, method, number = (
        a.text("recompute_granularity"),
        a.text("recompute_method"),
        a.integer("recompute_num_layers"),
    )
    if a.switch("recompute_activations"):
        granularity = "selective"
    if granularity is None:
        return {}
    if granularity == "full" and method == "uniform" and (number or 1) > 1:
        notes.implied.append(
            f"{a.shown('recompute_num_layers')}: the input of every layer is kept, not of each {number}th"
        )
    is_block = granularity == "full" and method == "block" and number
    return {"recompute": granularity} | ({"recompute_layers": number} if is_block else {})


def _precision(a: Arguments, notes: Notes) -> dict[str, Any]:
    formats, recipe, history = a.text("fp8_format"), a.text("fp8_recipe"), a.integer("fp8_amax_history_len")
    algorithm, is_fp16, is_bf16 = a.text("fp8_amax_compute_algo"), a.switch("fp16"), a.switch("bf16")
    keeps_bf16 = a.switch("first_last_layers_bf16")
    starts, ends = a.integer("num_layers_at_start_in_bf16"), a.integer("num_layers_at_end_in_bf16")
    if is_fp16:
        notes.changed.append(f"{a.shown('fp16')}: {explain('fp16')}")
    if formats is None:
        return {"mode": "bf16" if is_bf16 or is_fp16 else "fp32"}
    if recipe not in ("delayed", "tensorwise", "blockwise"):
        notes.refused.append(f"{a.shown('fp8_recipe')}: not implemented; delayed, tensorwise or blockwise")
    if (formats == "e4m3") != (recipe == "blockwise"):
        here = "e4m3" if recipe == "blockwise" else "e4m3, and e5m2 for gradients"
        notes.changed.append(f"{a.shown('fp8_format')}: with precision.recipe = {recipe}, FP8 is {here} here")
    if recipe == "delayed" and algorithm == "most_recent" and history > 1:
        notes.changed.append(f"{a.shown('fp8_amax_compute_algo')}: scales are of the largest amax of the history here")
    precision = {"mode": "fp8", "recipe": recipe} | ({"amax_history": history} if recipe == "delayed" else {})
    return precision | ({"bf16_first_layers": starts, "bf16_last_layers": ends} if keeps_bf16 else {})


def _data(a: Arguments, notes: Notes) -> dict[str, Any]:
    train, valid = _datasets(a, notes, "data_path"), _datasets(a, notes, "valid_data_path")
    is_split = not a.switch("train_data_path")
    train = train or _datasets(a, notes, "train_data_path")
    if not train:
        notes.todo.append(
            "data.train: the arguments name no data; set your datasets, as `triaxis preprocess` makes them"
        )
        train = [{"path": "data/text_document"}]
    is_masked = a.switch("reset_attention_mask") | a.switch("dataloader_inter_document_masking")
    if not is_masked:
        notes.implied.append(
            f"no {flag('reset_attention_mask')}: data.document_mask = false; true, the default, keeps attention within "
            "documents"
        )
    return {
        "tokenizer": _tokenizer(a, notes),
        "train": train,
        **({"valid": valid} if valid else {}),
        "split": _split(a) if is_split else [1, 0, 0],
        "seq_length": a.required("seq_length", notes.refused),
        "document_mask": is_masked,
        "num_workers": a.integer("num_workers"),
    }


def _datasets(a: Arguments, notes: Notes, name: str) -> list[dict[str, Any]]:
    """The datasets of pairs `weight prefix`, or of prefixes."""
    words = a.values(name)
    try:
        weights = [float(word) for word in words[::2]]
    except ValueError:
        weights = []
    if weights and len(words) == 2 * len(weights):
        return [{"path": path, "weight": weight} for path, weight in zip(words[1::2], weights, strict=True) if weight]
    if len(words) > 1:
        notes.todo.append(f"{flag(name)} without weights: Megatron-LM weights datasets by their size; set each weight")
    return [{"path": word} for word in words]


def _split(a: Arguments) -> list[float]:
    text = a.text("split") or DEFAULT_SPLIT
    try:
        shares = [float(share) for share in text.strip("'\"").split(",")]
    except ValueError:
        raise ConfigError(f"--split {text}: expected shares with commas between them, as in 99,1,0") from None
    return [*shares, 0.0, 0.0][:3]


def _tokenizer(a: Arguments, notes: Notes) -> str:
    kind, path = a.text("tokenizer_type"), a.text("tokenizer_model")
    if path is None or kind not in _MODEL_FILES:
        names = [name for name in ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file") if a.switch(name)]
        given = f"{a.shown(*names)}: not translated" if names else f"no {flag('tokenizer_type')}"
        notes.todo.append(f"data.tokenizer: {given}; set a tokenizer's file (docs/data.md) or a directory with one")
        return "tokenizer.json"
    if not Path(path).exists():
        notes.todo.append(
            f"data.tokenizer: {path} is not on this machine; it is a file or a directory, not a name of the Hub"
        )
    return str(path)


def _evaluation(a: Arguments, *, has_valid: bool) -> dict[str, int]:
    steps, interval = a.integer("eval_iters"), a.integer("eval_interval") or 0
    return {"eval_interval": interval, "eval_steps": steps} if has_valid and steps else {}


def _checkpoint(a: Arguments, notes: Notes) -> dict[str, Any]:
    interval = a.integer("save_interval")
    if a.switch("save"):
        notes.changed.append(
            f"{flag('save')}: Megatron-LM keeps every checkpoint; checkpoint.keep_last = 3 keeps three"
        )
    else:
        notes.implied.append(f"no {flag('save')}: a checkpoint is saved at the end all the same")
    return {"interval": interval if a.switch("save") and interval else 0}
