"""New records from existing ones: edit pairs, text edits, and images of rendered text (paper, Figs. 3 and 4)."""
