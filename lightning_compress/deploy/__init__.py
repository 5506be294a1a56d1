"""Deployment: write a file for a runtime, run it there, compare it with the model it was made from."""

from lightning_compress.deploy.closeness import Agreement, LargestDifference
from lightning_compress.deploy.formats import FORMATS, Format
from lightning_compress.deploy.verify import Artifact

__all__ = ["FORMATS", "Agreement", "Artifact", "Format", "LargestDifference"]
