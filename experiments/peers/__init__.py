"""The tools that ours is compared with, one file a tool; each imports no code of ours but the shared training."""
