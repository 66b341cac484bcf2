"""Public benchmarks: images in the layout that the official scorers read, checks of them, official statistics."""
