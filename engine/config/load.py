"""Load a `Config` from a YAML file and command-line overrides.

Precedence: defaults < model preset < file < command line. Unknown keys are errors that say what to use instead: the
counterpart of another trainer's setting (`foreign.py`), the section that has the setting, or a name spelled alike. All
problems are reported in one error, so that a cluster job does not queue again for each typo.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from engine.config.checks import cross_checks
from engine.config.foreign import explain
from engine.config.recipes import find_config
from engine.config.schema import SOURCES, Config, Section
from engine.errors import ConfigError, TriaxisError
from engine.formatting import counted, did_you_mean

Presets = Mapping[str, Mapping[str, Any]]
Trained = Callable[[str, Path], tuple[Mapping[str, Any], str | None]]
"""Called with `from_hf` or `from_checkpoint` and its directory; returns the model's fields and its tokenizer."""


def load(
    path: Path | str, overrides: Sequence[str] = (), *, presets: Presets, trained: Trained | None = None
) -> Config:
    """Load a `Config` from a YAML file and command-line overrides.

    Args:
        path: the YAML file, or the name of a recipe.
        overrides: for example `["--batch.micro", "2", "--run.dir=runs/a"]`; values are YAML.
        presets: model fields by preset name.
        trained: reads the directory of a trained model; if None, only presets are supported.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    file = find_config(str(path))
    source = str(path) if file == Path(path) else f"{path} ({file})"
    return resolve(read_yaml(file), overrides, presets=presets, source=source, trained=trained)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, or not a YAML mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:  # errors then name the file
            content = yaml.safe_load(file)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        raise ConfigError(f"{path} is empty; expected a mapping of sections")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected a mapping of sections")
    return content


def resolve(
    raw: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    presets: Presets,
    source: str,
    trained: Trained | None = None,
) -> Config:
    """Build a `Config` from nested mappings; see `load`."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    pairs = _pairs(overrides)
    if any(key == f"model.{name}" for key, _ in pairs for name in SOURCES):
        merged["model"] = {}  # a preset or a trained model on the command line replaces the file's model
    problems = [_apply_override(merged, key, value) for key, value in pairs]
    problems += [_apply_source(merged, presets, trained)]
    filled = (
        {"model"} if problems[-1] is not None else set()
    )  # fields of a source that failed are not reported as missing
    problems += [_family_problem(merged, presets)]
    filled |= {"data.tokenizer"} if filled and not _named(merged, "preset") else set()
    config: Config | None = None
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        errors: list[dict[str, Any]] = [dict(item) for item in error.errors()]
        missing = [e for e in errors if e["type"] == "missing" and filled & {e["loc"][0], ".".join(map(str, e["loc"]))}]
        problems += [problem for e in errors if e not in missing for problem in _describe(e)]
    if config is not None:
        problems += cross_checks(config)
    found = [problem for problem in problems if problem]
    if found or config is None:
        raise ConfigError("\n  ".join([f"{counted(len(found), 'problem')} in {source}:", *found]))
    return config


def changed_settings(before: Mapping[str, Any], config: Config) -> list[str]:
    """List the settings whose values in `config` differ from an earlier configuration, as `key: old -> new`."""
    old, new = _flat(before), _flat(yaml.safe_load(config.to_yaml()))
    expected = {"run.dir", "run.resume", *(f"model.{name}" for name in SOURCES)}
    keys = [key for key in old if key in new and old[key] != new[key] and key not in expected]
    return [f"{key}: {old[key]} -> {new[key]}" for key in keys]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Parse `--key value` and `--key=value` into pairs; a switch of another trainer, `--key`, is one that is true."""
    pairs, rest = [], list(overrides)
    while rest:
        item = rest.pop(0)
        if not item.startswith("--"):
            raise ConfigError(
                f"unexpected argument {item!r}; overrides look like --section.key VALUE, with quotes around spaces"
            )
        key, equals, value = item[2:].partition("=")
        if not equals:
            is_last = not rest or rest[0].startswith("--")
            if is_last and (explain(key) is None or key in _settings(Config)):
                raise ConfigError(f"--{key} needs a value, as in --{key} VALUE")
            value = "true" if is_last else rest.pop(0)
        pairs.append((key, value))
    return pairs


def _apply_override(raw: dict[str, Any], key: str, text: str) -> str | None:
    *sections, last = key.split(".")
    node = raw
    for name in sections:
        child = node.get(name)
        if not isinstance(child, dict):
            child = node[name] = {}
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return f"{key} = {text}: not valid YAML ({error.__class__.__name__})"
    return None


def _named(raw: Mapping[str, Any], source: str) -> bool:
    """Whether the model section sets this source."""
    model = raw.get("model")
    return isinstance(model, dict) and model.get(source) is not None


def _apply_source(raw: dict[str, Any], presets: Presets, trained: Trained | None) -> str | None:
    """Fill the model's fields, and a trained model's tokenizer, from the source; return the problem, if any."""
    given = [name for name in SOURCES if _named(raw, name)]
    if not given:
        return None
    model = raw["model"]
    name, value = given[0], model[given[0]]
    if len(given) > 1:
        return f"model.{' and model.'.join(given)} exclude each other: each is a whole model; keep one of them"
    if name != "preset" and trained is not None:
        try:
            fields, tokenizer = trained(name, Path(str(value)))
        except TriaxisError as error:
            return f"model.{name} = {value}: {error}"
        raw["model"] = {**fields, **model}
        if tokenizer is not None and isinstance(raw.get("data"), dict):
            raw["data"].setdefault("tokenizer", tokenizer)
    elif name == "preset":
        if not isinstance(value, str) or value not in presets:
            known = ", ".join(presets)
            return f"model.preset = {value!r} is unknown{did_you_mean(str(value), presets)}; known: {known}"
        raw["model"] = {**presets[value], **model}
    return None


def _family_problem(raw: Mapping[str, Any], presets: Presets) -> str | None:
    """Check `model.family` against the presets, which cover every family."""
    model = raw.get("model")
    name = model.get("family") if isinstance(model, dict) else None
    known = list(dict.fromkeys(preset["family"] for preset in presets.values() if "family" in preset))
    if not isinstance(name, str) or name in known:
        return None
    return f"model.family = {name!r} is unknown{did_you_mean(name, known)}; known: {', '.join(known)}"


def _describe(item: dict[str, Any]) -> Iterator[str]:
    location = [str(part) for part in item["loc"]]
    path = ".".join(location)
    if item["type"] == "extra_forbidden":
        yield from _describe_unknown(location, item["input"])
    elif item["type"] == "missing":
        yield f"{path}: required, but not given"
    elif item["type"] == "model_type" and (names := _siblings([*location, ""])):
        example = _list_example(location[:-1], names[0], item["input"]) if location[-1].isdigit() else ""
        yield f"{path} = {item['input']!r}: a section, not a setting; its settings are {', '.join(names)}{example}"
    elif item["type"] in ("list_type", "tuple_type") and (names := _siblings([*location, "0", ""])):
        example = _list_example(location, names[0], item["input"])
        yield f"{path} = {item['input']!r}: expected a list of sections{example}"
    else:
        yield f"{path} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _list_example(location: Sequence[str], name: str, value: Any) -> str:
    """Show how the command line gives a list of sections."""
    return f"; as in --{'.'.join(location)} '[{{{name}: {value}}}]'"


def _describe_unknown(location: Sequence[str], value: Any) -> Iterator[str]:
    """Say for a key that does not exist, or for each key of a section that does not exist, what to use instead."""
    path, name = ".".join(location), location[-1]
    hint, similar = explain(path), did_you_mean(name, _siblings(location))
    inside = _flat(value) if isinstance(value, dict) and not hint else {}
    if inside and (not similar or any(explain(f"{path}.{key}") for key in inside)):
        for key, inner in value.items():
            yield from _describe_unknown([*location, str(key)], inner)
        return
    elsewhere = [own for own in _settings(Config) if own.rpartition(".")[2] == name]
    hint = hint or (f"use {' or '.join(elsewhere)}" if elsewhere else "")
    yield f"{path}: no such setting{f'; {hint}' if hint else similar}"


def _settings(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting."""
    for key, field in section.model_fields.items():
        name = f"{prefix}{field.alias or key}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _settings(field.annotation, f"{name}.")
        else:
            yield name


def _siblings(location: Sequence[str]) -> list[str]:
    """List the names that are valid in place of the last part of `location`."""
    section: Any = Config
    for name in location[:-1]:
        if name.isdigit():
            continue
        fields = {field.alias or key: field for key, field in section.model_fields.items()}
        types = _types(fields[name].annotation) if name in fields else []
        section = next((t for t in types if isinstance(t, type) and issubclass(t, Section)), None)
        if section is None:
            return []
    return [field.alias or key for key, field in section.model_fields.items()]


def _types(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [annotation] if not inner else [t for part in inner for t in _types(part)]
