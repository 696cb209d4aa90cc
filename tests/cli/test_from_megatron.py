"""Real command lines of Megatron-LM, and what becomes of single arguments. Sources: tests/cli/megatron/README.md."""

import io
import json
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from engine.cli.from_megatron import main
from engine.cli.megatron.arguments import DEFAULT_SPLIT, DEFAULTS, Arguments
from engine.cli.megatron.translation import translate
from engine.config.foreign import MEGATRON
from engine.config.load import resolve
from engine.config.schema import Config, ModelConfig
from engine.errors import ConfigError
from engine.model.families import PRESETS
from engine.optim.schedule import learning_rate

MEGATRON_FILES = Path(__file__).parent / "megatron"
KNOWN_DEFAULTS = json.loads((MEGATRON_FILES / "defaults.json").read_text())
LLAMA = """--num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 128 --max-position-embeddings 256
    --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope --vocab-size 1000
    --micro-batch-size 2 --global-batch-size 16 --train-iters 100 --lr 3e-4 --bf16 --tokenizer-type Llama2Tokenizer
    --tokenizer-model tokenizer.model --data-path data/web_text_document"""


def translated(text: str = "", base: str = LLAMA) -> tuple[Config, dict[str, list[str]]]:
    """The configuration of arguments, as our loader has it, and the notes."""
    config, notes = translate(Arguments(shlex.split(f"{base} {text}")))
    return resolve(config, presets=PRESETS, source="test"), vars(notes)


def refusal(text: str = "", base: str = LLAMA) -> str:
    with pytest.raises(ConfigError) as caught:
        translated(text, base)
    return str(caught.value)


@pytest.fixture
def of_script(tmp_path, monkeypatch, capsys):
    """Gives the command what a script of Megatron-LM echoes; returns the configuration and the comments."""
    monkeypatch.chdir(tmp_path)
    Path("pretrain_gpt.py").touch()
    echo = "".join(f'{name}() {{ echo {name} "$@"; }}\n' for name in ("torchrun", "srun")) + '. "$0" > all\n'

    def run(name: str, *words: str) -> tuple[Config, str]:
        subprocess.run(["bash", "-c", echo, str(MEGATRON_FILES / name), *words], check=True)
        (line,) = [line for line in Path("all").read_text().splitlines() if ".py" in line]
        monkeypatch.setattr("sys.stdin", io.StringIO(line))
        main(["-"])
        printed = capsys.readouterr().out
        return resolve(yaml.safe_load(printed), presets=PRESETS, source=name), printed

    return run


def test_defaults_are_those_of_megatrons_parser():
    assert {name: KNOWN_DEFAULTS[name] for name in DEFAULTS} == DEFAULTS
    assert KNOWN_DEFAULTS["split"] is None and DEFAULT_SPLIT == "969,30,1"


def test_the_table_has_only_arguments_of_megatrons_parser():
    assert not {name for name in MEGATRON if "*" not in name} - set(KNOWN_DEFAULTS)


def test_the_llama_script_is_translated(of_script):
    config, comments = of_script("train_llama3_8b_h100_fp8.sh", "checkpoints/l", "logs", "tokenizer", "data/web")
    assert str(config.run.dir) == "checkpoints/l"
    preset = PRESETS["llama3-8b"] | {"rope_theta": 1e6, "init_std": 0.0134}
    assert {key: getattr(config.model, key) for key in preset} == preset
    assert (config.precision.mode, config.precision.recipe, config.precision.amax_history) == ("fp8", "delayed", 1024)
    assert (config.parallel.fp8_param_gather, config.parallel.grad_reduce_dtype) == (True, "bf16")
    assert (config.parallel.tp, config.parallel.pp, config.parallel.timeout_s) == (1, 1, 3600)
    assert (config.data.tokenizer, str(config.data.train[0].path)) == ("tokenizer", "data/web")
    assert (config.data.split, config.data.document_mask, config.data.num_workers) == ((99, 1, 0), False, 1)
    assert (config.batch.micro, config.batch.global_) == (1, 128)
    assert config.train.steps == 1953125000 // 128
    assert (config.train.eval_interval, config.train.eval_steps) == (100, 32)
    assert config.lr_schedule.warmup_steps == 3906252 // 128
    assert (config.optimizer.lr, config.lr_schedule.min_lr, config.lr_schedule.kind) == (1.5e-4, 1e-5, "cosine")
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.95), 0.1)
    assert (config.checkpoint.interval, config.log.interval, config.log.tensorboard) == (1000, 1, True)
    lines = comments.replace("\n#   ", " ").splitlines()
    different = lines[lines.index("# Different here:") : lines.index("# No counterpart, left out:")]
    assert any("--lr-decay-samples 1949218748: the decay ends at step 15228271 there" in line for line in different)
    assert "- --decoupled-lr 5.0e-4, --decoupled-min-lr 4.5e-5: not implemented: another learning rate" in comments
    assert "- --sequence-parallel: on wherever parallel.tp > 1" in comments
    assert "triaxis check FILE --gpus 8" in comments
    assert "Not known" not in comments


def test_a_script_without_data_leaves_them_to_its_reader(of_script):
    _, comments = of_script("train_llama3_8b_h100_fp8.sh")
    assert "# Set yourself:\n# - data.train: the arguments name no data" in comments
    assert "--mock-data: not implemented" in comments


@pytest.mark.parametrize(
    ("script", "reasons"),
    [
        (
            "train_gpt3_175b_distributed.sh",
            ["--position-embedding-type learned_absolute (default of Megatron-LM): rotary"],
        ),
        ("train_mixtral_8x7b_distributed.sh", ["--num-experts 8: not implemented: mixture of experts"]),
        ("train_mamba.sh", ["--hybrid-layer-pattern 'M-M-M--M", "--position-embedding-type none: rotary"]),
    ],
)
def test_scripts_of_other_models_are_refused(of_script, script, reasons):
    with pytest.raises(ConfigError) as caught:
        of_script(script, "a", "b", "c", "d", "e")
    for reason in reasons:
        assert f"\n  {reason}" in str(caught.value)


@pytest.mark.parametrize(
    ("conf", "preset", "differs"),
    [
        ("Llama-3.1-8B-Instruct", "llama3.1-8b", {"max_position": 8192}),
        ("Qwen2.5-7B-Instruct", "qwen2.5-7b", {"max_position": 32768, "norm_eps": 1e-5}),
        ("Qwen3-8B", "qwen3-8b", {"norm_eps": 1e-5}),
    ],
)
def test_models_are_those_of_our_presets(of_script, tmp_path, conf, preset, differs):
    script = tmp_path / "train.sh"
    script.write_text(
        f'. {MEGATRON_FILES / conf}.sh\nsrun -N 4 bash -c "python -u pretrain_gpt.py $MODEL_ARGS --vocab-size '
        f'{PRESETS[preset]["vocab_size"]} --lr 1e-4 --train-iters 10 --global-batch-size 64"'
    )
    main_config, comments = of_script(script)
    assert main_config.model == ModelConfig(**PRESETS[preset] | differs)
    assert "--attention-dropout 0.1 (default of Megatron-LM), --hidden-dropout 0.1 (default of Megatron-LM)" in comments


def test_what_becomes_of_checkpoints():
    resumed, other = (translated(f"--save ckpt --load {name}")[1] for name in ("ckpt", "other"))
    said = "--load ckpt: run.resume = auto resumes from run.dir, not from Megatron-LM's files"
    assert said in resumed["implied"] and not any("--load" in line for line in resumed["todo"])
    assert any(line.startswith("--load other: checkpoints of Megatron-LM are not read") for line in other["todo"])


def test_absent_arguments_have_megatrons_defaults():
    config, notes = translated("--save a")
    assert (config.model.tie_embeddings, config.model.num_kv_heads, config.model.head_dim) == (True, 8, 32)
    assert config.model.intermediate_size == 640  # 4 · 256 · 2/3 in multiples of 64
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.999), 0.01)
    assert (config.lr_schedule.kind, config.lr_schedule.warmup_steps, config.lr_schedule.min_lr) == ("linear", 0, 0)
    assert (config.data.split, config.data.document_mask, config.data.num_workers) == ((969, 30, 1), False, 2)
    assert (config.train.eval_steps, config.train.eval_interval, config.log.interval) == (100, 0, 100)
    assert not config.log.tensorboard
    assert any("dropout" in line for line in notes["changed"])
    assert translated(base=LLAMA.replace("--bf16", ""))[0].precision.mode == "fp32"


def test_layer_norms_and_biases_are_starcoders():
    base = LLAMA.replace("--swiglu --normalization RMSNorm --disable-bias-linear", "")
    model = translated(base=base)[0].model
    assert (model.family, model.norm, model.activation, model.output_bias) == ("starcoder2", "layer", "gelu", True)
    assert model.intermediate_size == 4 * 256


def test_a_family_that_does_not_exist_is_refused():
    said = refusal(
        "--squared-relu", LLAMA.replace("--normalization RMSNorm --disable-bias-linear", "--normalization LayerNorm")
    )
    assert "--squared-relu: not implemented: squared ReLU" in said
    assert "without --disable-bias-linear" in said and "no family of models has model.norm = layer" in said
    assert "a head size other than hidden_size / num_heads" in refusal("--kv-channels 64 --add-qkv-bias")


def test_a_window_counts_the_token_itself():
    model = translated("--window-size 4095,0")[0].model
    assert (model.family, model.sliding_window) == ("mistral", 4096)
    assert "expected N,0" in refusal("--window-size 10,10")


def test_samples_and_fractions_become_steps():
    base = LLAMA.replace("--train-iters 100", "--train-samples 1600")
    schedule = translated("--lr-warmup-fraction 0.1 --lr-decay-samples 800", base)
    assert (schedule[0].train.steps, schedule[0].lr_schedule.warmup_steps) == (100, 5)  # a fraction of the decay
    assert (
        "--lr-decay-samples 800: the decay ends at step 50 there, and here at train.steps = 100"
        in schedule[1]["changed"]
    )
    assert translated("--lr-warmup-samples 160", base)[0].lr_schedule.warmup_steps == 10


@pytest.mark.parametrize(
    (
        "style",
        "rates",
    ),  # steps 1, 4, 10, 17 and 20 of megatron/core/optimizer_param_scheduler.py after as many of its steps
    [
        ("linear", [7.5e-05, 0.0003, 0.00019875, 8.0625e-05, 3e-05]),
        ("cosine", [7.5e-05, 0.0003, 0.000216662263, 5.27516023e-05, 3e-05]),
        ("constant", [7.5e-05, 0.0003, 0.0003, 0.0003, 0.0003]),
        ("WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 5", [7.5e-05, 0.0003, 0.0003, 0.000192, 3e-05]),
    ],
)
def test_learning_rates_are_megatrons(style, rates):
    base = LLAMA.replace("--train-iters 100", "--train-iters 20")
    config, _ = translated(f"--lr-warmup-iters 4 --min-lr 3e-5 --lr-decay-style {style}", base)
    ours = [learning_rate(step, config.optimizer.lr, config.lr_schedule, 20) for step in (1, 4, 10, 17, 20)]
    assert ours == pytest.approx(rates, rel=1e-8)


def test_pipelines():
    parallel = translated("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2")[0].parallel
    assert (parallel.schedule, parallel.virtual_stages) == ("interleaved", 2)
    first, last = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
    for ends, layers in (
        (f"{first} 1 {last} 1", (1, 3, 3, 1)),
        (f"{first} 5", (5, 1, 1, 1)),
        (f"{last} 5", (1, 1, 1, 5)),
    ):
        config, _ = translated(f"--pipeline-model-parallel-size 4 {ends}")
        assert config.parallel.layers_per_stage == layers
    assert "does not divide 8 layers over 4 stages" in refusal(f"--pipeline-model-parallel-size 4 {first} 1 {last} 2")


def test_recomputation():
    assert translated("--recompute-activations")[0].parallel.recompute == "selective"
    full = "--recompute-granularity full --recompute-num-layers 2 --recompute-method"
    assert translated(f"{full} block")[0].parallel.recompute_layers == 2
    assert translated(f"{full} uniform")[0].parallel.recompute_layers is None


def test_datasets_with_weights_and_without():
    config, _ = translated("--data-path 0.7 a 0.3 b 0 c")
    assert [(str(d.path), d.weight) for d in config.data.train] == [("a", 0.7), ("b", 0.3)]
    config, notes = translated("--data-path a b")
    assert [str(d.path) for d in config.data.train] == ["a", "b"]
    assert any("Megatron-LM weights datasets by their size" in line for line in notes["todo"])
    separate = LLAMA.replace("--data-path", "--valid-data-path v --train-data-path")
    config, _ = translated(base=separate)
    assert (config.data.split, str(config.data.valid[0].path), config.train.eval_steps) == ((1, 0, 0), "v", 100)


def test_half_precision_moments_and_fp8():
    assert translated("--fp16 --loss-scale 8192", LLAMA.replace("--bf16", ""))[0].precision.mode == "bf16"
    low = "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
    assert translated(f"{low} --adam-beta2 0.95")[0].optimizer.moments == "bf16"
    config, notes = translated(low)
    assert config.optimizer.moments == "fp32" and any("--exp-avg-dtype bf16" in line for line in notes["changed"])
    precision = translated("--fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16")[0].precision
    assert (precision.recipe, precision.bf16_first_layers, precision.bf16_last_layers) == ("tensorwise", 1, 1)
    assert "--fp8-recipe mxfp8: not implemented; delayed, tensorwise or blockwise" in refusal(
        "--fp8-format e4m3 --fp8-recipe mxfp8"
    )


def test_the_global_batch_without_the_argument_is_one_microbatch_on_each_rank():
    base = LLAMA.replace("--global-batch-size 16", "--tensor-model-parallel-size 2")
    launcher = "torchrun --nproc_per_node 8 --nnodes=2 pretrain_gpt.py"
    assert translated(base=f"{launcher} {base}")[0].batch.global_ == 2 * 16 // 2
    assert "--global-batch-size: missing" in refusal(base=base)


def test_every_argument_is_accounted_for():
    _, notes = translated("--context-parallel-size 2 --manual-gc --wandb-project p --my-own-flag 3 --fp8-margin 0")
    assert any(line.startswith("--context-parallel-size 2: not implemented") for line in notes["left_out"])
    assert any("--wandb-project p: not implemented: W&B" in line for line in notes["left_out"])
    assert any(line.startswith("--manual-gc: always on") for line in notes["implied"])
    assert notes["unknown"] == ["--my-own-flag 3"]


@pytest.mark.parametrize(
    ("given", "heading"),
    [
        ("--pipeline-model-parallel-layout Et*4|L", "todo"),
        ("--finetune", "todo"),
        ("--eod-mask-loss", "changed"),
        ("--decoupled-lr 1e-3", "changed"),
        ("--end-weight-decay 0.2", "changed"),
        ("--weight-decay-incr-style constant", "implied"),
    ],
)
def test_what_changes_training_is_not_said_to_be_harmless(given, heading):
    _, notes = translated(given)
    of_argument = {name for name, lines in notes.items() if any(given.split()[0][:7] in line for line in lines)}
    assert of_argument == {heading}


def test_a_decay_of_wsd_that_is_not_given_is_left_to_set():
    assert any("lr_schedule.decay_steps" in line for line in translated("--lr-decay-style WSD")[1]["todo"])


def test_unknown_arguments_are_a_warning_and_a_thing_to_do(capsys):
    main([f"{LLAMA} --tensor-model-paralel-size 2 --no-such-flag 3"])
    printed = capsys.readouterr()
    unknown = "--tensor-model-paralel-size 2 (did you mean '--tensor-model-parallel-size'?), --no-such-flag 3"
    assert printed.err == f"warning: 2 arguments not known to this command: {unknown}\n"
    assert "\n# - 2 arguments not known to this command, listed below\n#" in printed.out.partition("Different here:")[0]


def test_what_is_missing_is_listed_at_once():
    said = refusal(base="--num-layers 2 --swiglu")
    for name in (
        "hidden-size",
        "num-attention-heads",
        "max-position-embeddings",
        "seq-length",
        "micro-batch-size",
        "lr",
    ):
        assert f"\n  --{name}: missing; " in said
    assert "--train-iters or --train-samples: missing" in said


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--num-layers x"], "--num-layers x: expected an integer"),
        (["--", "--lr", "1", "2"], "--lr 1 2: expected one value"),
        (
            ["--num-layers $LAYERS"],
            r"\$LAYERS is a variable of a shell script; .*`bash SCRIPT \| triaxis from-megatron -`",
        ),
        (["--num-layers", "2"], "--num-layers: put the arguments of Megatron-LM into quotes, or -- before them"),
        (["none.txt"], "cannot read the arguments in none.txt"),
        (["--num-layers '2"], "not a line of a shell"),
    ],
)
def test_arguments_that_are_none(given, expected):
    with pytest.raises(ConfigError, match=expected):
        main(given)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1e9", "1e400", "nan", ""])
def test_no_value_ends_in_a_traceback(value):
    for name in sorted({*KNOWN_DEFAULTS} - {"optimizer"}):
        with suppress(ConfigError):
            translated(f"--{name.replace('_', '-')} '{value}'")


def test_the_ways_to_give_arguments_say_the_same(tmp_path, capsys, monkeypatch):
    printed = []
    (tmp_path / "file.txt").write_text(f"# a comment\n{LLAMA.replace(' --seq', chr(92) + chr(10) + ' --seq')}\n")
    for given in ([LLAMA], ["--", *LLAMA.split()], [str(tmp_path / "file.txt")], ["-"]):
        monkeypatch.setattr("sys.stdin", (tmp_path / "file.txt").open())
        main(given)
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1 and "num_layers: 8" in printed[0]
