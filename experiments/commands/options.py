"""From words on a command line to a training configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config import TrainConfig, load_toml, moved
from experiments.fields import merged
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come along."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and [source] table of a recipe by name, or of a TOML file by path."""
    path = Path(name)
    if path.suffix != ".toml":
        path = RECIPES / f"{name}.toml"
        if not path.is_file():
            known = nearest(name, recipe_names())
            raise UnknownNameError(f"unknown recipe {name!r}; {known}, or a path ending in .toml")
    table = load_toml(path)
    about = {name: table.pop(name, {}) for name in ("source", "evaluate")}
    for part, value in about.items():
        if not isinstance(value, dict):
            raise ConfigurationError(f"{path}: [{part}] must be a table, not {value!r}")
    for key in about["evaluate"]:
        if key != "attacks":
            raise UnknownNameError(f"{path}: unknown key 'evaluate.{key}'; {nearest(key, ['attacks'])}")
    if not isinstance(about["evaluate"].get("attacks", []), list):
        raise ConfigurationError(f"{path}: evaluate.attacks must be a list, such as ['aa2:300', 'aa']")
    return table, about


def assignments(words: Sequence[str]) -> dict[str, Any]:
    """`--set attack.steps=7` and the like as a table; values are JSON where they parse as such, text elsewhere."""
    table: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path.strip():
            raise ConfigurationError(f"--set {word!r}: write KEY=VALUE, for instance --set attack.steps=7")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        entry: Any = value
        for part in reversed(path.strip().split(".")):
            entry = {part: entry}
        table = merged(table, entry)
    return table


def configuration(
    recipe: str | None, given: dict[str, Any], words: Sequence[str]
) -> tuple[TrainConfig, dict[str, Any]]:
    """Recipe, then named options, then --set; what the recipe says besides comes along."""
    table: dict[str, Any] = {}
    about: dict[str, Any] = {}
    if recipe is not None:
        table, about = load_recipe(recipe)
        other = given.get("method")
        if other is not None and other != table.get("method"):
            raise ConfigurationError(f"recipe {recipe!r} is for method {table.get('method')!r}, not {other!r}")
    chosen = {key: value for key, value in given.items() if value is not None}
    over = merged(chosen, assignments(words))
    # What belongs to what is replaced goes with it: a network's options, the augmentation of a data set.
    for name, part in (("network", "network_options"), ("data", "augment")):
        if name in table and over.get(name, table[name]) != table[name]:
            table.pop(part, None)
    return TrainConfig.from_dict(merged(moved(table, over.get("epochs")), over)), about
