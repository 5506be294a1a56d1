"""The model and the images of ``lightning-compress demo``: what it needs is in the package."""
