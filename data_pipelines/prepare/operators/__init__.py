"""The operators of `emma-data annotate`, one file each. The table of their names is in prepare/operator.py."""
