"""IsoLoss in a plain PyTorch training loop: `python plain_torch.py`."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.transforms import v2

from isofast_kernels import IsoLoss

BATCH = 64
augment = v2.RandomAffine(degrees=12, translate=(0.1, 0.1), scale=(0.85, 1.15), shear=8)


def views(x_BCHW: Tensor) -> Tensor:
    """Augment each image twice; return (2, B, C, H, W)."""
    return torch.stack([torch.stack([augment(x) for x in x_BCHW]) for _ in range(2)])


def main(steps: int = 60, checkpoint: str | None = None) -> tuple[nn.Module, IsoLoss]:
    """Train, and save everything needed to resume."""
    torch.manual_seed(0)
    x_NCHW = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
    )
    projector = nn.Sequential(
        *(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU()),
        *(nn.Linear(128, 32), nn.BatchNorm1d(32)),
    )
    network, criterion = nn.Sequential(encoder, projector), IsoLoss(dim=32, decay=0.9)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(steps):
        x1_BCHW, x2_BCHW = views(x_NCHW[torch.randint(len(x_NCHW), (BATCH,))])
        loss = criterion(network(x1_BCHW), network(x2_BCHW))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if checkpoint is not None:
        # the criterion's state holds C
        parts = {"network": network, "criterion": criterion, "optimizer": optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    return network, criterion


if __name__ == "__main__":
    main(checkpoint="run.pt")
