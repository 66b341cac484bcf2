"""From public sources to WebDataset shards with an index and a manifest."""
