"""Public benchmarks: images in the layout that the official scorers read, checks of them, official statistics; adapters
of evaluation harnesses; judges."""
