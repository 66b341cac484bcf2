"""Recipes: dataclasses, loading, and the checks that need more than one field."""

from emma_train.config.load import config_hash, load_recipe, load_yaml, to_yaml
from emma_train.config.schema import Recipe
from emma_train.errors import UserError

__all__ = ["Recipe", "UserError", "config_hash", "load_recipe", "load_yaml", "to_yaml"]
