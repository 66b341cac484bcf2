"""The loop, and what it needs at each step: build order, optimizer, schedule, EMA, run folder."""
