"""Everything that feeds the trainer: `prepare` makes shards, `stream` turns them into packed batches."""
