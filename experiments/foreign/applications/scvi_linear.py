"""Train scvi-tools' SCVI with a linear decoder."""

import numpy as np
import scvi
from anndata import AnnData

counts = np.random.default_rng(0).poisson(1.0, (256, 50)).astype("float32")
cells = AnnData(counts)
scvi.model.LinearSCVI.setup_anndata(cells)
scvi.model.LinearSCVI(cells, n_hidden=64).train(max_epochs=6, accelerator="cpu")
