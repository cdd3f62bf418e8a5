"""IsoLoss in a training step in the style of solo-learn, without depending on it: features,
embeddings and an online classifier on the detached features."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from isofast_kernels import IsoLoss

Batch = tuple[Tensor, list[Tensor], Tensor]


class Isotropic(nn.Module):
    """The parts of a solo-learn method: backbone, projector, classifier, loss."""

    def __init__(self, backbone: nn.Module, features: int, classes: int, dim: int = 32) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(features, classes)
        self.projector = nn.Sequential(
            *(nn.Linear(features, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, dim), nn.BatchNorm1d(dim)),
        )
        self.criterion = IsoLoss(dim, decay=0.9, gather_distributed=True)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Return what solo-learn's base class returns for a view."""
        feats_BF = self.backbone(x_BCHW)
        logits_BK = self.classifier(feats_BF.detach())
        return {"feats": feats_BF, "logits": logits_BK, "z": self.projector(feats_BF)}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a batch (indices, views, labels), and its terms for logging."""
        _, views, y_B = batch
        out1, out2 = (self(x_BCHW) for x_BCHW in views)
        class_loss = sum(functional.cross_entropy(out["logits"], y_B) for out in (out1, out2)) / 2
        ssl_loss = self.criterion(out1["z"], out2["z"])
        return {"loss": ssl_loss + class_loss, "ssl_loss": ssl_loss, "class_loss": class_loss}


def main(steps: int = 60) -> tuple[nn.Module, IsoLoss]:
    """Train on the digits, with noise as the augmentation."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels, y_N = load_digits(return_X_y=True)
    x_NF, y_N = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(y_N)
    method = Isotropic(nn.Sequential(nn.Linear(64, 256), nn.ReLU()), features=256, classes=10)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        index_B = torch.randint(len(x_NF), (64,))
        views = [x_NF[index_B] + 0.1 * torch.randn(64, 64) for _ in range(2)]
        loss = method.training_step((index_B, views, y_N[index_B]), step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return method, method.criterion


if __name__ == "__main__":
    main()
