"""Train scvi-tools' SCVI on counts of genes in cells."""

import numpy as np
import scvi
from anndata import AnnData

counts = np.random.default_rng(0).poisson(1.0, (256, 50)).astype("float32")
cells = AnnData(counts)
scvi.model.SCVI.setup_anndata(cells)
scvi.model.SCVI(cells, n_hidden=64).train(max_epochs=6, accelerator="cpu")
