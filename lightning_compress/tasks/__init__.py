"""What the command does: each task is a function of the composed configuration."""
