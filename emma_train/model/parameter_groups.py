"""The parameter groups of the model, by the names of its parameters."""

from functools import cache

GROUPS = {
    "und_adapter": ("und_adapter.",),
    "gen_adapter": ("gen_adapter.",),
    "velocity_head": ("velocity_head.",),
    "stem_expert": ("vision.stem_layers.",),
    "router": ("vision.router.",),
    "vision": ("vision.",),
    "decoder": ("decoder.",),
}
"""Parameter groups by name prefix; the first that fits wins. The autoencoder belongs to none: it never trains."""


@cache
def group_of(name: str) -> str:
    """Parameter group of a parameter name. Raises KeyError for a name that belongs to none."""
    for group, prefixes in GROUPS.items():
        if name.startswith(prefixes):
            return group
    raise KeyError(name)
