"""Watching a run: metrics and trackers, the progress line, FLOPs and MFU, and the report page."""
