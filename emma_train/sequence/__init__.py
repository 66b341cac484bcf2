"""A sample as tokens, the same for training and for generation."""
