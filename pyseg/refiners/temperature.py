"""Temperature scaling as a refiner: probabilities that mean what they say, labels as they were."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import SpecError
from ..types import Segmentation


class Temperature:
    """Divides logits by one number (Guo et al., "On calibration of modern neural networks", 2017).

    Networks are surer than they are right, as a rule: a ``value`` above 1 makes them less sure. No
    label changes, and the logits stay: `Segmentation.temperature` is set, by which probabilities,
    confidences and the metric ``calibration`` divide. `pyseg tune temperature` fits it on images
    that were not trained on. Stages after it get the changed probabilities.

    Weights may tell a temperature of their own, with which predictions come. This one takes its
    place.

    Args:
        value: what the logits are divided by, above 0; 1 takes them as they are.

    Example:
        >>> pyseg.build("streetnet+temperature(value=1.4)")("street.jpg").confidence()
    """

    def __init__(self, *, value: float = 1.0) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"value must be above 0 and finite, got {value}")
        self.value = value

    def __repr__(self) -> str:
        return f"Temperature(value={self.value!r})"

    def config(self) -> dict[str, Any]:
        """The options that make it again."""
        return {"value": self.value}

    def refine(self, image: Tensor, prediction: Segmentation) -> Segmentation:
        """The prediction with ``value`` as its temperature, and everything else as it was.

        Raises:
            SpecError: the prediction holds no logits.
        """
        if prediction.logits is None:
            raise SpecError(
                "temperature needs logits, but the stage before it gave labels only; put "
                "temperature earlier"
            )
        if self.value == prediction.temperature:
            return prediction
        return replace(prediction, temperature=self.value)
