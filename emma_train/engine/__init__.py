"""Sharding, precision and the optimizer behind one small protocol."""
