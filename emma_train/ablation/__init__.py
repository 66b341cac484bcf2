"""Ablations: arms x seeds of a recipe, trained, scored and compared in pairs (docs/ablations.md)."""
