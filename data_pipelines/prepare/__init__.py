"""Prepares public data sets: importers, operators that annotate records, selections, synthesis, cards."""
