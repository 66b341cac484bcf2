"""The shard format and its tools: tar, record, images, index, latents, check, stats, write, fetch."""
