"""chemprop's own command, on molecules that are written first."""

import sys
from pathlib import Path

from chemprop.cli.main import main

smiles = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCC", "CCOC", "C1CCCCC1", "CCCl", "CCBr", "CC#N"] * 8
Path("molecules.csv").write_text("\n".join(["smiles,length", *(f"{s},{len(s)}" for s in smiles)]) + "\n")
sys.argv = ["chemprop", "train", "--data-path", "molecules.csv", "--task-type", "regression", "--epochs", "6"]
sys.argv += ["--accelerator", "cpu", "--output-dir", "trained", "--message-hidden-dim", "64", "--num-workers", "0"]
main()
