"""What a sample is as tokens: one truth for training and for generation."""
