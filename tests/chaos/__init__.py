"""Training while faults are injected: `python -m tests.chaos --minutes 60 --seed 0 --out DIR` (docs/reliability.md)."""
