"""Checkpoints: sharded saves beside training, atomic commit, retention, verification and loading."""
