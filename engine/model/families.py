"""Named model sizes. A new size is a row here; parameter counts are tested against the published ones."""

from typing import Any

_LLAMA = {"family": "llama", "norm": "rms", "norm_eps": 1e-5, "activation": "swiglu"}
_MISTRAL = _LLAMA | {"family": "mistral"}
_QWEN2 = _LLAMA | {"family": "qwen2", "norm_eps": 1e-6, "qkv_bias": True, "rope_theta": 1e6}
_QWEN3 = _LLAMA | {"family": "qwen3", "norm_eps": 1e-6, "qk_norm": True, "rope_theta": 1e6}
_STARCODER2 = {
    "family": "starcoder2",
    "norm": "layer",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "qkv_bias": True,
    "output_bias": True,
    "tie_embeddings": True,
}
_LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position": 8192,
}


def _size(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv: int,
    vocab: int,
    longest: int,
    head_dim: int | None = None,
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_heads": heads,
        "num_kv_heads": kv,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab,
        "max_position": longest,
    }


_TINY = _size(4, 64, 176, 4, 2, 257, 4096)  # 257: the byte tokenizer

PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _LLAMA | _size(32, 4096, 11008, 32, 32, 32000, 4096),
    "llama3-8b": _LLAMA | _size(32, 4096, 14336, 32, 8, 128256, 8192) | {"rope_theta": 5e5},
    "llama3.1-8b": _LLAMA
    | _size(32, 4096, 14336, 32, 8, 128256, 131072)
    | {"rope_theta": 5e5, "rope_scaling": _LLAMA31_ROPE},
    "mistral-7b": _MISTRAL | _size(32, 4096, 14336, 32, 8, 32000, 32768) | {"sliding_window": 4096},
    "qwen2.5-7b": _QWEN2 | _size(28, 3584, 18944, 28, 4, 152064, 131072),
    "qwen3-8b": _QWEN3 | _size(36, 4096, 12288, 32, 8, 151936, 40960, head_dim=128),
    "starcoder2-7b": _STARCODER2
    | _size(32, 4608, 18432, 36, 4, 49152, 16384)
    | {"rope_theta": 1e6, "sliding_window": 4096},
    "tiny": _LLAMA | _TINY,
    "tiny-llama3": _LLAMA | _TINY | {"rope_scaling": _LLAMA31_ROPE | {"original_max_position": 256}},
    "tiny-mistral": _MISTRAL | _TINY | {"sliding_window": 32},
    "tiny-qwen2": _QWEN2 | _TINY,
    "tiny-qwen3": _QWEN3 | _TINY | {"head_dim": 32},
    "tiny-starcoder2": _STARCODER2 | _TINY | {"intermediate_size": 256, "sliding_window": 32},
}
