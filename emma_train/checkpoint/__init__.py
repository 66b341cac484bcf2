"""Checkpoints: written beside and renamed when whole, `latest` last; one rule to find, check and load them."""
