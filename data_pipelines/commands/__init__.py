"""The commands of emma-data, one file each: their options, and the calls that do the work."""
