"""One optimizer step: forward and backward of the microbatches in the pipeline, then the update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.config.schema import Config
from engine.data.samples.batch import Batch
from engine.data.samples.permutation import keyed_below
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.model.parameters import parameter_table
from engine.ops.attention_choice import AttentionImpls
from engine.ops.linear import MATMUL_KINDS
from engine.optim.optimizer import ShardedAdamW
from engine.parallel.data import ShardedParameters
from engine.parallel.fp8 import Fp8State, runs_in_fp8
from engine.parallel.layout import TensorParallel, World
from engine.parallel.pipeline.check import check_schedule
from engine.parallel.pipeline.executor import Pipeline
from engine.parallel.pipeline.partition import Part
from engine.parallel.pipeline.program import Program
from engine.parallel.pipeline.schedules import FORWARD_ONLY, build_schedule
from engine.plan.stages import stage_parts


@dataclass(frozen=True)
class StepResult:
    """Result of a step. Tensors are fp32 [1] on the device, and the host has not waited for them.

    `loss` is this rank's part of the loss: the sum over its tokens divided by the target tokens of the global batch.
    Its sum over ranks is the mean over all target tokens, however the batch is partitioned.
    """

    step: int
    lr: float
    tokens: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor


class DistributedModel:
    """This rank's parts of the model, run as one stage of the pipeline."""

    def __init__(
        self,
        config: Config,
        world: World,
        parts: Sequence[Part],
        parameters: ShardedParameters,
        onednn: frozenset[str] = MATMUL_KINDS,
        attention: AttentionImpls = AttentionImpls(),  # noqa: B008 (immutable)
    ) -> None:
        self.config, self.world = config, world
        self.fp8 = fp8_state(config, parameters, world)
        quantizers = {} if self.fp8 is None else self.fp8.quantizers
        given = Parameters(parameters.by_path, parameters.sinks, quantizers, onednn)
        options = (world.tp, config.parallel, config.ops, attention)
        decoders = [Decoder(config.model, given, part, *options) for part in parts]
        for unit in (unit for decoder in decoders for unit in decoder.units()):
            parameters.wait_for_params_before_forward(unit)
        self.dtype = next(iter(parameters.by_path.values())).dtype
        functions = [_part_function(decoder, config, world.tp) for decoder in decoders]
        self.pipeline = Pipeline(functions, world, parameters.flow, self._new_boundary)
        self._programs: dict[tuple[str, int], Program] = {}

    def train(self, microbatches: Sequence[Batch], scale: float) -> torch.Tensor:
        """Accumulate the gradients of `scale` times the summed loss; return this rank's part of that loss, fp32 [1]."""
        if self.fp8 is not None:
            self.fp8.begin_step()
        loss = self._run(self.config.parallel.schedule, microbatches, scale)
        if self.fp8 is not None:
            self.fp8.end_step()
        return loss

    def evaluate(self, microbatches: Sequence[Batch]) -> torch.Tensor:
        """Return this rank's part of the summed loss, fp32 [1]."""
        return self._run(FORWARD_ONLY, microbatches, 1.0)

    def warm_up(self, batch: Batch) -> None:
        """Compute on `batch` all that schedules compute, with nothing sent or received between stages.

        A kernel, a library's plan, compiled code or a block of memory comes into being at its first use, for which the
        host may wait for the device; here no receive can be on the device that waits for this rank. Ranks that share
        layers call it together. It leaves its gradients, which `train_step` overwrites, and otherwise changes nothing:
        not the random state either, which compilers and other libraries may use.
        """
        on_device = batch.to(self.world.device)
        # a second pass adds to the gradients of the first
        names = [self.config.parallel.schedule] * 2 + [FORWARD_ONLY] * bool(self.config.train.eval_steps)

        def use() -> None:
            self.pipeline.flow.step += 1
            for name in names:
                self.pipeline.warm_up(self._program(name, 1), on_device)

        with torch.random.fork_rng([self.world.device] if self.world.device.type == "cuda" else []):
            if self.fp8 is None:
                use()
            else:
                self.fp8.rehearse(use)

    def _run(self, name: str, microbatches: Sequence[Batch], scale: float) -> torch.Tensor:
        if self.fp8 is not None:
            self.fp8.weights_changed()
        on_device = [batch.to(self.world.device) for batch in microbatches]
        loss = self.pipeline.run(self._program(name, len(microbatches)), on_device, scale)
        return loss if self.world.coords.tp == 0 else torch.zeros_like(loss)  # tensor-parallel ranks have the same loss

    def _program(self, name: str, num_microbatches: int) -> Program:
        key = (name, num_microbatches)
        if key not in self._programs:
            schedule = build_schedule(name, self.world.layout.pp, *key[1:], self.config.parallel.virtual_stages)
            self._programs[key] = check_schedule(schedule)
        return self._programs[key]

    def _new_boundary(self) -> torch.Tensor:
        tokens = self.config.batch.micro * self.config.data.seq_length
        shape = (tokens // self.world.layout.tp, self.config.model.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.world.device)


def fp8_state(config: Config, parameters: ShardedParameters, world: World) -> Fp8State | None:
    """Create the FP8 state of this rank's FP8 layers; None in other precisions."""
    if config.precision.mode != "fp8":
        return None
    precision, layers = config.precision, config.model.num_layers
    local = (slot.parameter for bucket in parameters.buckets for slot in bucket.plan.slots)
    chosen = {p.path: parameters.by_path[p.path] for p in local if runs_in_fp8(p, precision, layers)}
    return Fp8State(
        chosen,
        precision.recipe,
        world,
        amax_history=precision.amax_history,
        impl=config.ops.fp8_matmul,
        gathered={} if parameters.fp8 is None else parameters.fp8.by_path,
    )


def build_model(
    config: Config,
    world: World,
    dtype: torch.dtype,
    *,
    seed: int | None,
    onednn: frozenset[str] = MATMUL_KINDS,
    attention: AttentionImpls = AttentionImpls(),  # noqa: B008 (immutable)
) -> tuple[DistributedModel, ShardedAdamW]:
    """Build this rank's parts of the model and their optimizer; weights are drawn from `seed`, or zeros if None.
    `onednn`: see `Parameters`; `attention`: see `Decoder`.
    """
    parts = stage_parts(config.model, config.parallel, config.data.seq_length, world.layout.pp, world.coords.pp)
    table = parameter_table(config.model, parts, world.tp)
    in_fp8 = {p.path for p in table.parameters if runs_in_fp8(p, config.precision, config.model.num_layers)}
    parameters = ShardedParameters(
        table,
        dtype,
        world,
        sharded=config.parallel.sharded_optimizer,
        reduce_dtype=torch.bfloat16 if config.parallel.grad_reduce_dtype == "bf16" else torch.float32,
        in_fp8=in_fp8 if config.parallel.fp8_param_gather else (),
    )
    if seed is not None:
        parameters.initialize(seed)
    model = DistributedModel(config, world, parts, parameters, onednn, attention)
    return model, ShardedAdamW(parameters, config.optimizer)


def _part_function(
    decoder: Decoder, config: Config, tp: TensorParallel
) -> Callable[[torch.Tensor | None, Batch, float], torch.Tensor]:
    """Wrap a part of the model for the pipeline: (hidden states or None, batch, factor of the loss) -> hidden states or
    the summed loss.

    The z-loss and the noise on embeddings apply only in training.
    """
    alpha = config.train.neftune_alpha if decoder.embedding is not None else 0.0
    hidden_size, seed = config.model.hidden_size, config.run.seed

    def run(x: torch.Tensor | None, batch: Batch, scale: float) -> torch.Tensor:
        inputs, positions = batch.tokens.flatten() if x is None else x, batch.positions.flatten()
        training = torch.is_grad_enabled()
        noise = embedding_noise(batch, alpha, hidden_size, seed, tp) if alpha and training else None
        if decoder.head is not None:
            labels, mask = batch.labels.flatten(), batch.loss_mask.flatten()
            weight = config.train.z_loss if training else 0.0
            options = weight, noise, batch.target_indices, scale
            return decoder.loss(inputs, positions, labels, mask, batch.cu_seqlens, *options)
        hidden: torch.Tensor = decoder(inputs, positions, decoder.attend_within(batch.cu_seqlens), noise)
        return hidden

    return run


def embedding_noise(batch: Batch, alpha: float, hidden_size: int, seed: int, tp: TensorParallel) -> torch.Tensor:
    """NEFTune (Jain et al. 2023, arXiv 2310.05914): uniform noise, fp32 [t/tp, h], of alpha / sqrt(length · h) at most.

    The noise depends only on the run's seed and the number of the sequence, and is the same in every layout. The length
    is that of the conversation that a token belongs to.
    """
    (rows, s), h, device = batch.tokens.shape, hidden_size, batch.tokens.device
    first, count = tp.share(rows * s)
    drawn = []
    for row in range(first // s, -(-(first + count) // s)):
        key = keyed_below(1 << 63, "neftune", seed, batch.sample_numbers[row])
        drawn.append(torch.rand(s, h, device=device, generator=torch.Generator(device).manual_seed(key)))
    noise = torch.cat(drawn)[first % s :][:count]
    cuts = torch.tensor(batch.cu_seqlens)
    lengths = cuts.diff().repeat_interleave(cuts.diff())[first : first + count].to(device)
    return (noise * 2 - 1) * (alpha / (lengths * h).sqrt())[:, None]


def train_step(
    model: DistributedModel,
    optimizer: ShardedAdamW,
    microbatches: Sequence[Batch],
    *,
    step: int,
    lr: float,
    tokens: int,
) -> StepResult:
    """Train on one global batch.

    Args:
        microbatches: this rank's microbatches.
        step: number of this step, from 1.
        tokens: target tokens of the global batch, over all ranks.
    """
    optimizer.parameters.begin_step()
    loss = model.train(microbatches, 1 / tokens)
    model.world.activity.phase = f"step {step}, updating the weights"
    grad_norm, skipped = optimizer.update(step, lr)
    return StepResult(step, lr, tokens, loss, grad_norm, skipped)
