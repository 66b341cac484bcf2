"""FLOPs of each module, and the work in a packed batch."""
