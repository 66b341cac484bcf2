"""Whether two runs computed the same: read from their folders alone."""
