"""python -m experiments.foreign.cli fit --config experiments/foreign/cli.yaml: LightningCLI."""

from lightning.pytorch.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI()
