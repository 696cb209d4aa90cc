"""cuBLASLt's algorithms for the FP8 matmuls of this process, chosen by measuring.

csrc makes a plan at the first matmul of each shape, with the algorithm that cuBLASLt's heuristic puts first. The
heuristic is a model of the GPU, and the fastest is often another of its first few. Alternative considered: operators
that take the algorithm as an argument; every call would then carry what csrc knows by the shape.
"""

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from engine.ops import native
from engine.ops.fp8 import add_scaled_matmul, scaled_matmul
from engine.ops.measured import Key, fastest
from engine.ops.quantize import BLOCK_1X128, BLOCK_128X128, BLOCK_SIZE, TENSORWISE, QuantizedTensor, Scaling

ALGORITHM_BYTES = 64
NUM_CANDIDATES = 8
_ROUNDS, _MARGIN = 5, 0.01
_MIN_CALLS = 4  # timed together, so that the clock's resolution and the first launch do not count
_ROTATED_BYTES = 2**27  # of operands that take turns: more than twice the L2 cache of an H200
_MAX_SETS = 8
_AHEAD_CYCLES = 500_000  # the GPU sleeps so long that the host has launched all calls when the first one starts
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)  # as triaxis_dtype
_SCALINGS: tuple[Scaling, ...] = (TENSORWISE, BLOCK_1X128, BLOCK_128X128)  # as triaxis_scaling


class Plan(NamedTuple):
    """The key of a plan in csrc: out [m, n] = a [m, k] · bᵀ; dtypes and scalings as in csrc/include/triaxis.h."""

    device: int
    m: int
    n: int
    k: int
    a_dtype: int
    b_dtype: int
    out_dtype: int
    a_scaling: int
    b_scaling: int
    fast: int


class Fp8Plans:
    """The plans of a compiled library; by default of the installed one, which may be missing."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._library = ctypes.CDLL(str(native.LIBRARY)) if library is None and not native.WHY_NOT else library

    @property
    def version(self) -> int:
        """The version of cuBLASLt, for example 130000; 0 if it cannot be loaded."""
        assert self._library is not None
        function = self._library.triaxis_cublaslt_version
        function.restype = ctypes.c_uint64
        return int(function())

    def existing(self) -> list[Plan]:
        """Return the plans that exist, in a fixed order."""
        if self._library is None:
            return []
        count = self._library.triaxis_fp8_plans(None, 0)
        numbers = (ctypes.c_int64 * (len(Plan._fields) * count))()
        self._library.triaxis_fp8_plans(numbers, count)
        return [Plan(*numbers[i : i + len(Plan._fields)]) for i in range(0, len(numbers), len(Plan._fields))]

    def candidates(self, plan: Plan, most: int = NUM_CANDIDATES) -> list[bytes]:
        """Return at most `most` algorithms that can run, the heuristic's first choice first."""
        content, found = ctypes.create_string_buffer(most * ALGORITHM_BYTES), ctypes.c_int()
        self._call("triaxis_fp8_algorithms", plan, most, content, ctypes.byref(found))
        return [content.raw[i : i + ALGORITHM_BYTES] for i in range(0, found.value * ALGORITHM_BYTES, ALGORITHM_BYTES)]

    def use(self, plan: Plan, algorithm: bytes) -> None:
        """Compute the matmuls of `plan` with `algorithm` from now on.

        Raises:
            ValueError: it is not an algorithm, or cannot run on this GPU.
        """
        if len(algorithm) != ALGORITHM_BYTES:
            raise ValueError(f"an algorithm has {ALGORITHM_BYTES} bytes, not {len(algorithm)}")
        self._call("triaxis_fp8_use_algorithm", plan, algorithm)

    def measured_key(self, plan: Plan) -> Key:
        """Return what the result of `measure` depends on."""
        return {
            "what": "fp8-matmul",
            "gpu": torch.cuda.get_device_name(plan.device),
            "driver": _driver_version(),
            "cublaslt": self.version,
            **plan._replace(device=0)._asdict(),
        }

    def measure(self, plan: Plan) -> bytes:
        """Return the fastest of the candidates; takes about a tenth of a second. `plan` keeps the one timed last."""
        return fastest(self.candidates(plan), self.timer(plan), rounds=_ROUNDS, margin=_MARGIN)

    def timer(self, plan: Plan) -> Callable[[bytes], float]:
        """Return what measures the seconds of a matmul of `plan` by an algorithm, on random operands on the GPU."""
        calls = _calls(plan)

        def seconds(algorithm: bytes) -> float:
            try:
                self.use(plan, algorithm)
                return _seconds(calls)
            except (ValueError, RuntimeError):  # cuBLASLt may refuse what its heuristic has returned
                return math.inf

        return seconds

    def _call(self, name: str, plan: Plan, *arguments: object) -> None:
        assert self._library is not None
        if status := getattr(self._library, name)((ctypes.c_int64 * len(plan))(*plan), *arguments):
            describe = self._library.triaxis_error_string
            describe.restype = ctypes.c_char_p
            raise ValueError(f"FP8 matmul {plan.m} × {plan.n} × {plan.k}: {describe(status).decode()}")


def _driver_version() -> int:
    """The version of CUDA that the driver supports, for example 13000."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _calls(plan: Plan) -> list[Callable[[], object]]:
    """Matmuls of `plan`, on operands that take turns."""
    generator = torch.Generator(f"cuda:{plan.device}").manual_seed(0)
    out_dtype = _DTYPES[plan.out_dtype]
    set_bytes = (plan.m + plan.n) * plan.k + plan.m * plan.n * out_dtype.itemsize
    calls: list[Callable[[], object]] = []
    for _ in range(min(_MAX_SETS, -(-_ROTATED_BYTES // set_bytes))):
        a = _operand(plan.m, plan.k, plan.a_dtype, plan.a_scaling, generator)
        b = _operand(plan.n, plan.k, plan.b_dtype, plan.b_scaling, generator)
        if out_dtype == torch.float32 and not plan.fast:  # of a weight gradient, which is added up
            out = torch.zeros(plan.m, plan.n, device=generator.device)
            calls.append(partial(add_scaled_matmul, out, a, b, impl="cublaslt"))
        else:
            calls.append(partial(scaled_matmul, a, b, out_dtype, fast=bool(plan.fast), impl="cublaslt"))
    return calls * -(-_MIN_CALLS // len(calls))


def _operand(rows: int, columns: int, dtype: int, scaling: int, generator: torch.Generator) -> QuantizedTensor:
    values = torch.randn(rows, columns, dtype=torch.bfloat16, device=generator.device, generator=generator)
    blocks = -(-columns // BLOCK_SIZE)
    squares = (-(-rows // BLOCK_SIZE), -(-blocks // 4) * 4)
    shape = {TENSORWISE: (1,), BLOCK_1X128: (blocks, rows), BLOCK_128X128: squares}[_SCALINGS[scaling]]
    scale_inv = torch.ones(shape, device=generator.device)
    return QuantizedTensor(values.to(_DTYPES[dtype]), scale_inv, _SCALINGS[scaling])


def _seconds(calls: list[Callable[[], object]]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_AHEAD_CYCLES)
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / len(calls)
