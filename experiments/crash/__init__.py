"""Runs that are killed at every kind of place, taken up again, and compared with those that were not."""
