"""The world of the demo: drawn emoji, edits, questions and STEM charts, and the tiny tokenizer and autoencoder."""
