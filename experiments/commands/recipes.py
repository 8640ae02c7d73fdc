"""`python -m experiments recipes`: what can be trained by name."""

from __future__ import annotations

from experiments.commands.options import load_recipe, recipe_names


def command() -> int:
    """List the recipes, each with its source and what about it is guessed."""
    for name in recipe_names():
        _, about = load_recipe(name)
        source = about["source"]
        print(f"{name}\n  {source.get('title', '')}")
        for guess in source.get("guessed", []):
            print(f"  guessed: {guess}")
    return 0
