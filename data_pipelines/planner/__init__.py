"""Which samples a step consumes, from the shard indexes alone: sources, costs, shuffle, candidates, packing."""
