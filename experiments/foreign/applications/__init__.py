"""Applications that know nothing of this package: not a line of them speaks of compression."""
