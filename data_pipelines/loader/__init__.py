"""What a loader worker does: read planned samples from shards, build them, and hand packs to the trainer."""
