"""Readers of public formats: each is a function from a source to parts, which give records and rejects in order."""
