"""The Hydra configuration groups, found as ``pkg://lightning_compress.conf``."""
