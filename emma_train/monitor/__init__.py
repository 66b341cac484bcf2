"""Watching a run: metrics, trackers, memory, and the progress line."""
