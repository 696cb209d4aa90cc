"""The smallest configuration, and what becomes of changes to it."""

import json

import pytest

from engine.config.load import resolve
from engine.config.schema import Config
from engine.errors import ConfigError
from engine.model.families import PRESETS

MINIMAL = {
    "model": {"preset": "tiny"},
    "data": {"tokenizer": "byte", "train": [{"path": "corpus"}], "seq_length": 128},
    "batch": {"global": 8},
    "train": {"steps": 10},
}
FINE_TUNING = {"task": "sft", "data": MINIMAL["data"]}


def build(changes: dict | None = None, *overrides: str) -> Config:
    raw = json.loads(json.dumps(MINIMAL))
    for section, values in (changes or {}).items():
        raw[section] = raw.get(section, {}) | values if isinstance(values, dict) else values
    return resolve(raw, overrides, presets=PRESETS, source="test.yaml")


def message(changes: dict | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(changes, *overrides)
    return str(caught.value)
