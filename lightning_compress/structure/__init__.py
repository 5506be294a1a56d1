"""Structure: which channels, heads and blocks belong together, which go, and the record of what went."""
