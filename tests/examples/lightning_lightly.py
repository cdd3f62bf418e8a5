"""IsoLoss in a LightningModule, with lightly's transforms, head and momentum teacher:
`python lightning_lightly.py`."""

import copy

import pytorch_lightning as pl
import torch
from lightly.models.modules.heads import SimSiamProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from isofast_kernels import IsoLoss

DIM = 32


class Isotropic(pl.LightningModule):
    """BYOL from lightly's documentation, with a closed form instead of the prediction head."""

    def __init__(self) -> None:
        super().__init__()
        encoder = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        )
        self.student = nn.Sequential(encoder, SimSiamProjectionHead(256, 128, DIM))
        self.teacher = copy.deepcopy(self.student)
        deactivate_requires_grad(self.teacher)
        # Lightning checkpoints C with the module; on several devices, C is averaged over them
        self.criterion = IsoLoss(DIM, decay=0.9, gather_distributed=True)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Update the teacher and return the loss; only the student gets gradients."""
        momentum = cosine_schedule(self.global_step, self.trainer.max_steps, 0.9, 1)
        update_momentum(self.student, self.teacher, m=momentum)
        targets_VBD = [self.teacher(x_BCHW).detach() for x_BCHW in batch]
        loss = self.criterion(*map(self.student, batch), *targets_VBD)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use SGD on the student only."""
        return torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)


def loader(batch_size: int = 32) -> DataLoader:
    """Return batches of two views of the digits, as 32 x 32 RGB images."""
    first, second = (view(input_size=32) for view in (BYOLView1Transform, BYOLView2Transform))
    transform = BYOLTransform(first, second)
    pictures = [
        Image.fromarray((pixels * 15).astype("uint8")).convert("RGB").resize((32, 32))
        for pixels in load_digits().images
    ]

    def collate(images: list[Image.Image]) -> list[Tensor]:
        return [torch.stack(view) for view in zip(*map(transform, images), strict=True)]

    return DataLoader(pictures, batch_size, shuffle=True, drop_last=True, collate_fn=collate)


def main(steps: int = 20, **options: object) -> tuple[nn.Module, IsoLoss]:
    """Train; ``options`` go to the Trainer."""
    pl.seed_everything(0, verbose=False)
    model = Isotropic()
    pl.Trainer(max_steps=steps, **options).fit(model, loader())
    return model.student, model.criterion


if __name__ == "__main__":
    main()
