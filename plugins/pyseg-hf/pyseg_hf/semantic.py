"""Networks that give every pixel a class: semantic ones, and the zero-shot CLIPSeg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyseg.image import require_rgb8
from pyseg.models import SemanticModel, require_evaluation_mode
from pyseg.types import Segmentation

from . import files

# Vision transformers that take images of the size they were trained for, or of its shape.
_FIXED = ("beit", "clipseg", "data2vec-vision", "dpt", "sapiens2", "tipsv2_dpt")


class Network(nn.Module):
    """A network of transformers as pyseg's models hold it; it pickles.

    Args:
        model: of transformers.
        options: of subclasses.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self._options = model, options

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        model: Any = self.model
        if model.config.model_type == "oneformer":
            # Parts of it have a flag of their own, for dropout and for texts that only losses need.
            for part in model.modules():
                if hasattr(part, "is_training"):
                    part.is_training = mode and model.config.is_training
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # transformers hangs functions on its modules while they run, which do not pickle
        model: Any = self.model
        frozen = [key for key, value in model.named_parameters() if not value.requires_grad]
        made = (type(self), type(model), model.config, self._options)
        return _restored, (*made, model.state_dict(), frozen, model.dtype, self.training)


def _restored(
    wrapper: Any,
    kind: Any,
    config: Any,
    options: Mapping[str, Any],
    state: Mapping[str, Tensor],
    frozen: Sequence[str],
    dtype: torch.dtype,
    training: bool,
) -> Network:
    model = kind(config).to(dtype)
    model.load_state_dict(state)
    for key, value in model.named_parameters():  # some freeze parts when they are made
        value.requires_grad_(key not in frozen)
    return wrapper(model, **options).train(training)


class Logits(Network):
    """A semantic network: normalised images [N, 3, H, W] to logits [N, C, h, w].

    Args:
        model: of transformers.
        size: (height, width) that images are resized to, where the network takes no other.
        reverse: whether it takes BGR.
    """

    def __init__(
        self, model: nn.Module, size: tuple[int, int] | None = None, reverse: bool = False
    ) -> None:
        super().__init__(model, size=size, reverse=reverse)
        self.size, self.reverse = size, reverse

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(
                images, self.size, mode="bilinear", antialias=True, align_corners=False
            )
        return self.logits(images.flip(1) if self.reverse else images)

    def logits(self, values: Tensor) -> Tensor:
        """Of what the processor gives, which has the network's size and order of channels."""
        return self.model(pixel_values=values).logits


class SemanticHF(SemanticModel):
    """A semantic network; training sees crops as they are, `predict` images by its processor.

    Vision transformers of a fixed size get crops resized to it. The processor's central crop, for
    classifiers, is left out: every pixel gets a class.

    Args:
        model: of transformers.
        processor: of its images.
        classes: names, in the order of the logits' channels.
    """

    def __init__(self, model: Any, processor: Any, classes: Sequence[str]) -> None:
        if getattr(processor, "do_center_crop", False):
            processor.do_center_crop = False
        mean, std = _statistics(processor)
        super().__init__(self._wrapped(model, processor), classes, mean=mean, std=std)
        self.processor = processor

    def _wrapped(self, model: Any, processor: Any) -> Logits:
        fixed = model.config.model_type in _FIXED
        reverse = bool(getattr(processor, "do_flip_channel_order", False))
        return Logits(model, _size(processor) if fixed else None, reverse)

    @torch.no_grad()  # not inference_mode: BEiT keeps tensors, which training then cannot use
    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Images, each [3, H, W] uint8 RGB, to predictions with logits at the network's stride."""
        require_evaluation_mode(self)
        for index, image in enumerate(images):
            require_rgb8(image, f"images[{index}]")
        return [
            Segmentation(
                (image.shape[1], image.shape[2]),
                self.classes,
                logits=logits,
                image=image,
                palette=self.palette,
            )
            for image, logits in zip(images, self._all_logits(images), strict=True)
        ]

    def _all_logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [self.network.logits(self._prepare(image))[0] for image in images]

    def _prepare(self, image: Tensor) -> Tensor:
        values = self.processor(
            images=image, return_tensors="pt", input_data_format="channels_first"
        )
        return values["pixel_values"].to(self.mean)

    def config(self) -> dict[str, Any]:
        """What makes it again without the files of its id; saved with a pipeline."""
        return {"configuration": files.saved(self.network.model.config, self.processor, None)}


class Prompted(Logits):
    """CLIPSeg on texts: one map of scores for each.

    The encoders of images and texts are CLIP's and stay as they are, as published.

    Args:
        model: of transformers.
        tokens: ids [P, L] of the prompts.
        size: see `Logits`.
    """

    tokens: Tensor

    def __init__(self, model: Any, tokens: Tensor, size: tuple[int, int]) -> None:
        super().__init__(model, size)
        self._options = {"tokens": tokens, "size": size}
        model.clip.requires_grad_(False)
        self.register_buffer("tokens", tokens, persistent=False)

    def logits(self, values: Tensor) -> Tensor:
        return self.with_texts(values, self.texts())

    @torch.no_grad()
    def texts(self) -> Tensor:
        """What the prompts mean, [P, D]."""
        # No mask of the padding: attention goes backwards only, and the padding comes last.
        return self.model.clip.get_text_features(self.tokens).pooler_output

    def with_texts(self, values: Tensor, texts: Tensor) -> Tensor:
        """Logits [N, P, h, w]; the encoder sees every image once, the decoder once per prompt."""
        model, (images, prompts) = self.model, (len(values), len(texts))
        with torch.no_grad():
            states = model.clip.get_image_features(
                pixel_values=values, interpolate_pos_encoding=True, output_hidden_states=True
            ).hidden_states
        wanted = [states[k + 1].repeat_interleave(prompts, 0) for k in model.config.extract_layers]
        logits = model.decoder(wanted, texts.repeat(images, 1)).logits
        return logits.view(images, prompts, *logits.shape[-2:])


class PromptedHF(SemanticHF):
    """CLIPSeg, whose classes are its prompts.

    The network scores every prompt by itself: the sigmoid of a logit is the probability that the
    prompt holds at that place, whatever others do. Predictions keep these logits, and their
    softmax, our probabilities, is that of exactly one prompt holding: where scores s are
    independent, P(k alone) is proportional to s_k / (1 - s_k), the exponential of the logit. Labels
    are thus the prompt of the highest score, however low it is. There is no threshold, as none is
    published: a prompt for the rest, such as ``"background"``, takes pixels that fit no other.

    Training, by `pyseg.train`, fits the decoder to labels of which each pixel has one; CLIP's
    encoders stay as they are.

    Args:
        model: of transformers.
        processor: of its images.
        classes: the prompts.
        tokens: their ids [P, L].
    """

    network: Any

    def __init__(self, model: Any, processor: Any, classes: Sequence[str], tokens: Tensor) -> None:
        self._tokens = tokens
        super().__init__(model, processor, classes)

    def _wrapped(self, model: Any, processor: Any) -> Logits:
        return Prompted(model, self._tokens, _size(processor))

    def _all_logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        if not images:
            return []
        texts = self.network.texts()
        return [self.network.with_texts(self._prepare(image), texts)[0] for image in images]

    def config(self) -> dict[str, Any]:
        network = self.network
        return {"configuration": files.saved(network.model.config, self.processor, network.tokens)}


def _statistics(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation of images in 0..1, whatever range the processor's are of."""
    factor = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255.0
    normalises = getattr(processor, "do_normalize", True)
    mean = processor.image_mean if normalises else None
    std = processor.image_std if normalises else None
    return (
        [float(value) / factor for value in (mean or (0.0,) * 3)],
        [float(value) / factor for value in (std or (1.0,) * 3)],
    )


def _size(processor: Any) -> tuple[int, int]:
    """(height, width) of what a processor gives."""
    size = processor.size
    edge = size["height"] or size["shortest_edge"]
    return int(edge), int(size["width"] or edge)
