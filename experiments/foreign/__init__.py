"""The same callbacks in other people's training: a plain Trainer, LightningCLI, and a Hydra application."""
