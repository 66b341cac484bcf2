"""The training stages as data, freezing as pure functions, and the plan of a hand-off between stages."""
