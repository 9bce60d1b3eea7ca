"""Fully convolutional networks.

Source: Long, Shelhamer & Darrell, "Fully convolutional networks for semantic segmentation",
CVPR 2015.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import resnet


class FCN(nn.Module):
    """A ResNet whose scores at 1/8, 1/16 and 1/32 are summed, as FCN-8s sums those of VGG.

    Args:
        backbone: ``"resnet18"`` to ``"resnet152"``.
        classes: channels of the logits.
    """

    def __init__(self, backbone: str, classes: int) -> None:
        super().__init__()
        self.body, widths = resnet(backbone)
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths[1:])

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, classes, H / 8, W / 8]."""
        body = self.body
        x = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(images)))))
        total: Tensor | None = None
        outputs = []
        for layer in (body.layer2, body.layer3, body.layer4):
            x = layer(x)
            outputs.append(x)
        for score, output in reversed(list(zip(self.scores, outputs, strict=True))):
            logits = score(output)
            if total is not None:
                logits = logits + F.interpolate(total, logits.shape[2:], mode="bilinear")
            total = logits
        assert total is not None
        return total
