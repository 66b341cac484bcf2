"""The training stages as data, freezing as pure functions, and what is handed from one stage to the next."""
