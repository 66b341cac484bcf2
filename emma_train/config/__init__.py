"""Recipes: dataclasses, loading, and the checks that need more than one field."""

from emma_train.config.errors import UserError
from emma_train.config.load import config_hash, load_recipe, load_yaml, to_yaml
from emma_train.config.schema import Recipe

__all__ = ["Recipe", "UserError", "config_hash", "load_recipe", "load_yaml", "to_yaml"]
