"""A graph net of torch_geometric: 80 % zeros, then weights of 8 bits, as an ONNX file."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch_geometric.nn import DenseGraphConv

import lightning_compress


class Graph(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = DenseGraphConv(16, 64, aggr="mean"), DenseGraphConv(64, 64, aggr="mean")
        self.head = torch.nn.Linear(64, 4)

    def forward(self, x, adjacency):
        x = self.first(x, adjacency).relu()
        return self.head(self.second(x, adjacency).relu().mean(1))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0], batch[1]), batch[2])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0], batch[1]).argmax(-1) == batch[2]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


classes = torch.arange(256) % 4
nodes = torch.randn(4, 10, 16)[classes] + torch.randn(256, 10, 16)  # yours: to_dense_batch, to_dense_adj
data = DataLoader(TensorDataset(nodes, (torch.rand(256, 10, 10) < 0.3).float(), classes), batch_size=32)

callbacks = lightning_compress.recipe("graph")  # with edge_index there is no batch axis: recipe("graph", "export=null")
trainer = pl.Trainer(max_epochs=6, accelerator="cpu", logger=False, default_root_dir="runs/graph", callbacks=callbacks)
trainer.fit(Graph(), data, data)
