"""The emoji worlds, tiny, tiny-scenes and full: their concepts, skin tones and numbers of records. A model learns the
tiny one in minutes."""

from dataclasses import dataclass, field

TINY_CONCEPTS: dict[str, tuple[str, ...]] = {
    "Smileys & Emotion": (
        "grinning face", "angry face", "ghost", "robot", "skull", "alien", "clown face", "red heart",
    ),
    "People & Body": (
        "waving hand", "thumbs up", "flexed biceps", "victory hand", "raised fist", "ear", "nose", "baby",
    ),
    "Animals & Nature": (
        "dog face", "cat face", "pig face", "frog", "penguin", "fish", "octopus", "turtle",
    ),
    "Food & Drink": (
        "pizza", "banana", "red apple", "strawberry", "hamburger", "carrot", "doughnut", "watermelon",
    ),
    "Travel & Places": (
        "rocket", "airplane", "sailboat", "house", "sun", "bicycle", "umbrella", "rainbow",
    ),
    "Activities": (
        "soccer ball", "basketball", "balloon", "trophy", "wrapped gift", "kite", "christmas tree", "teddy bear",
    ),
    "Objects": (
        "guitar", "key", "light bulb", "bell", "camera", "crown", "pencil", "magnet",
    ),
    "Symbols": (
        "check mark", "cross mark", "up arrow", "plus", "red question mark", "yin yang", "peace symbol",
        "recycling symbol",
    ),
}  # fmt: skip
"""Eight short, common, visually distinct names from each of eight Unicode groups."""


@dataclass(frozen=True)
class Amounts:
    """How many records of each kind a split gets."""

    singles: int
    pairs: int
    stem: int
    scenes: int = 0
    """Prompts for scenes of several drawings or a word."""


@dataclass(frozen=True)
class EmojiWorld:
    """What a data set consists of. None for concepts or tones takes all of the package."""

    name: str
    concepts: frozenset[str] | None
    tones: frozenset[str] | None
    train: Amounts
    heldout_drawings: Amounts
    heldout_concepts: Amounts
    captions: int = field(default=2)
    """Number of different captions of one image."""
    scene_captions: bool = field(default=False)
    """Whether images with several drawings or a word are t2i targets too; off for the tiny model, which has little
    capacity."""
    in_steps: bool = field(default=False)
    """Whether answers reason before they answer (reasoning.py)."""
    chinese: bool = field(default=False)
    """Whether understanding is in Chinese too (chinese.py)."""


TINY = EmojiWorld(
    name="tiny",
    concepts=frozenset(name for names in TINY_CONCEPTS.values() for name in names),
    tones=frozenset({"default", "light", "medium", "dark"}),
    train=Amounts(singles=1100, pairs=500, stem=140),
    heldout_drawings=Amounts(singles=200, pairs=60, stem=24),
    heldout_concepts=Amounts(singles=80, pairs=20, stem=0),
)
FULL = EmojiWorld(
    name="full",
    concepts=None,
    tones=None,
    train=Amounts(singles=40_000, pairs=20_000, stem=800),
    heldout_drawings=Amounts(singles=2_000, pairs=1_000, stem=100),
    heldout_concepts=Amounts(singles=1_000, pairs=500, stem=0),
    captions=3,
    scene_captions=True,
)
TINY_SCENES = EmojiWorld(
    name="tiny-scenes",
    concepts=TINY.concepts,
    tones=TINY.tones,
    train=Amounts(singles=600, pairs=400, stem=60, scenes=1500),
    heldout_drawings=Amounts(singles=60, pairs=60, stem=24, scenes=240),
    heldout_concepts=Amounts(singles=20, pairs=20, stem=0, scenes=60),
    scene_captions=True,
)
"""The drawings of the tiny world, most of them in scenes of several, with attributes and positions for each."""
WORLDS = {world.name: world for world in (TINY, TINY_SCENES, FULL)}
