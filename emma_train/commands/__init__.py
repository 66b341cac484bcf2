"""One file a command of emma-train: `add_arguments` describes its options, `run` does it and returns the exit code.

Only these files join the rooms of emma_train with each other and with data_pipelines. They import what they use
inside functions, so that `emma-train --help` and a mistyped option answer at once.
"""
