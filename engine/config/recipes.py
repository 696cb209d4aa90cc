"""Finds configuration files, those that come with Triaxis included: the recipes of examples/configs/."""

from pathlib import Path

from engine.errors import ConfigError
from engine.formatting import did_you_mean


def recipes() -> dict[str, Path]:
    """Return the recipes by name: `llama2-7b` is examples/configs/llama2_7b.yaml, in a wheel engine/recipes/."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "recipes"
    folder = packaged if packaged.is_dir() else package.parent / "examples" / "configs"
    return {path.stem.replace("_", "-"): path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """Return the file at the path `name`, else the recipe of that name.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    known = recipes()
    if name in known:
        return known[name]
    if path.is_dir():
        example = f", as {path / 'config.yaml'}" if (path / "config.yaml").exists() else ""
        raise ConfigError(f"{path} is a directory; expected a configuration file{example}")
    files = [file.name for file in path.parent.glob("*.y*ml") if did_you_mean(path.stem, [file.stem])]
    problem = f"no configuration file at {path}{did_you_mean(path.name, files)}"
    if len(path.parts) == 1 and path.suffix not in (".yaml", ".yml"):
        problem += f", and no recipe of that name{did_you_mean(name, known)}; recipes: {', '.join(known)}"
    raise ConfigError(problem)
