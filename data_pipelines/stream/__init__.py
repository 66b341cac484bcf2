"""Shards to packed batches: index, plan, samplers, loader. Knows nothing about optimizers or engines."""
