"""`SemanticModel`: normalisation, batching and `predict` around any segmentation network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import PysegError
from ..image import default_palette, require_rgb8
from ..types import Segmentation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SemanticModel(nn.Module):
    """A network that gives every pixel one of ``classes``; a pipeline's first stage.

    It begins in evaluation mode, the network too: training calls ``train()``.

    Args:
        network: maps normalised RGB, float [N, 3, H, W], to logits [N, C, h, w] or to a mapping
            with those under ``"out"`` and, while training, further logits under names that start
            with ``"aux"``, each at its own stride.
        classes: the C class names, in the order of the logits' channels.
        palette: one RGB colour per class; None = `pyseg.image.default_palette`.
        mean: subtracted from each channel of an image in 0..1.
        std: what each channel is then divided by.
        max_batch_pixels: `predict` puts no more pixels than this in one batch (at least one image).

    Raises:
        ValueError: no class, or a palette of another length than ``classes``.

    Example:
        >>> model = SemanticModel(nn.Conv2d(3, 2, 1), ("road", "sky"))
        >>> model(torch.zeros(1, 3, 5, 7, dtype=torch.uint8))["out"].shape
        torch.Size([1, 2, 5, 7])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        palette: Sequence[tuple[int, int, int]] | None = None,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        max_batch_pixels: int = 4 << 20,
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        if not self.classes:
            raise ValueError("classes must name at least one class, got none")
        colours = default_palette(len(self.classes)) if palette is None else palette
        if len(colours) != len(self.classes):
            raise ValueError(
                f"palette must have one colour per class: {len(self.classes)} "
                f"classes, got {len(colours)} colours"
            )
        self.palette = tuple((int(r), int(g), int(b)) for r, g, b in colours)
        self.network = network
        self.max_batch_pixels = max_batch_pixels
        # Constants of the architecture, not learnt: kept out of state_dict.
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of a batch.

        Args:
            images: [N, 3, H, W] RGB, uint8, or floating point in 0..1.

        Returns:
            ``"out"``: logits [N, C, h, w] at the network's own stride, never upsampled;
            ``"aux…"``: logits of auxiliary heads, if the network gives any.

        Raises:
            ValueError: another shape.
            TypeError: another dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [N, 3, H, W] RGB, got {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise TypeError(f"images must be uint8, or floating point in 0..1, got {images.dtype}")
        output = self.network((images - self.mean) / self.std)
        return dict(output) if isinstance(output, Mapping) else {"out": output}

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Segments images of any sizes; those of equal size share batches.

        Changes nothing of the model, so that many threads may call it.

        Args:
            images: each [3, H, W] uint8 RGB, on any device.

        Returns:
            One `Segmentation` per image, in order, with ``logits`` on the model's device.

        Raises:
            ValueError: an image of another shape, or empty.
            TypeError: an image of another dtype.
            PysegError: the model is in training mode.
        """
        require_evaluation_mode(self)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            require_rgb8(image, f"images[{index}]")
            groups.setdefault((image.shape[1], image.shape[2]), []).append(index)
        results: dict[int, Segmentation] = {}
        for (height, width), members in groups.items():
            step = max(1, self.max_batch_pixels // (height * width))
            for start in range(0, len(members), step):
                chosen = members[start : start + step]
                batch = torch.stack([images[i].to(self.mean.device) for i in chosen])
                for i, logits in zip(chosen, self(batch)["out"], strict=True):
                    results[i] = Segmentation(
                        (height, width),
                        self.classes,
                        logits=logits,
                        image=images[i],
                        palette=self.palette,
                    )
        return [results[i] for i in range(len(images))]


def require_evaluation_mode(model: nn.Module) -> None:
    """Raises PysegError for a model in training mode.

    There predictions depend on their batch and change its statistics; and a switch here and back
    would be seen by other threads that predict with it.
    """
    if model.training:
        raise PysegError(
            f"this {type(model).__name__} is in training mode, in which predictions depend on "
            "their batch and change the model; call its eval() first"
        )
