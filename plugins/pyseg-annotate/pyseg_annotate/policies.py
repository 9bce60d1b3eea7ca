"""What a number of annotations buys: ICORD beside one each, a fixed number each, and a budget.

All choose from the same annotations, drawn in advance: of every object as many, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyseg.errors import PysegError

from .consensus import bounding_region, local_staple, majority, staple

Consensus = Callable[[np.ndarray], np.ndarray]  # [K, h, w] bool -> [h, w] bool

CONSENSUS: dict[str, Consensus] = {
    "majority": majority,
    "staple": lambda masks: staple(masks, bounding_region(masks)).mask,
    "local_staple": lambda masks: local_staple(masks, bounding_region(masks)).mask,
}


@dataclass(frozen=True, eq=False)
class Offer:
    """What is drawn of one object, in the order in which it would be asked for."""

    masks: np.ndarray  # [K, h, w] bool
    quality: np.ndarray  # [K] predicted


@dataclass(frozen=True, eq=False)
class Bought:
    """What a policy has taken."""

    masks: dict[str, np.ndarray]  # by object
    spent: dict[str, int]

    @property
    def mean_spent(self) -> float:
        """Annotations an object."""
        return sum(self.spent.values()) / len(self.spent)


def fixed(offers: Mapping[str, Offer], number: int, consensus: Consensus = majority) -> Bought:
    """So many annotations of every object, and their consensus; 1 = the first as it is."""
    _check(offers, number)
    masks = {id: consensus(offer.masks[:number]) for id, offer in offers.items()}
    return Bought(masks, dict.fromkeys(offers, number))


def icord(
    offers: Mapping[str, Offer],
    threshold: float,
    rounds: int,
    unresolved: Consensus | None = None,
) -> Bought:
    """What `engine.collect` would come to.

    Args:
        offers: annotations.
        threshold: τ.
        rounds: N.
        unresolved: consensus of the N of an object that was never accepted; None = the best of
            them by predicted quality, as ICORD has it.
    """
    _check(offers, rounds)
    masks, spent = {}, {}
    for id, offer in offers.items():
        good = np.flatnonzero(offer.quality[:rounds] >= threshold)
        spent[id] = int(good[0]) + 1 if good.size else rounds
        if good.size or unresolved is None:
            masks[id] = offer.masks[int(offer.quality[: spent[id]].argmax())]
        else:
            masks[id] = unresolved(offer.masks[:rounds])
    return Bought(masks, spent)


def budgeted(
    offers: Mapping[str, Offer], mean: float, number: int, consensus: Consensus = majority
) -> Bought:
    """One annotation each; what is left goes to those of the lowest predicted quality.

    These get ``number`` annotations and their consensus, as many as the budget allows: in the
    manner of BUOCA (Sameki, Lai, Mays, Guo, Ishwar, Betke, 2019), which decides so between one
    worker and a crowd. The last one may get fewer, an odd number.

    Args:
        offers: annotations.
        mean: the budget, annotations an object.
        number: of the crowd.
        consensus: of its masks.

    Raises:
        PysegError: a budget below one each.
    """
    _check(offers, number)
    left = round(mean * len(offers)) - len(offers)
    if not mean >= 1:
        raise PysegError(f"mean must be 1 or more, as every object is annotated once, got {mean}")
    spent = dict.fromkeys(offers, 1)
    for id in sorted(offers, key=lambda id: float(offers[id].quality[0])):
        more = min(number - 1, left)
        if more < number - 1:
            more -= more % 2
        spent[id] += more
        left -= more
        if left < 2:
            break
    return Bought(
        {
            id: offer.masks[0] if spent[id] == 1 else consensus(offer.masks[: spent[id]])
            for id, offer in offers.items()
        },
        spent,
    )


def curve(
    buy: Callable[[float], Bought],
    values: Sequence[float],
    score: Callable[[Bought], float],
) -> list[dict[str, Any]]:
    """Cost and quality of a policy over one of its settings.

    Args:
        buy: the policy by its setting, such as ``lambda t: icord(offers, t, 5)``.
        values: of the setting.
        score: such as the mean Jaccard index with the truth.

    Returns:
        ``value``, ``annotations`` (an object) and ``score``, one of each value.
    """
    points = []
    for value in values:
        bought = buy(value)
        points.append({"value": value, "annotations": bought.mean_spent, "score": score(bought)})
    return points


def _check(offers: Mapping[str, Offer], number: int) -> None:
    if not offers:
        raise PysegError("offers: there is no object")
    few = min(len(offer.masks) for offer in offers.values())
    if not 1 <= number <= few:
        raise PysegError(
            f"the number of annotations must be 1 to {few}, what every object has, got {number}"
        )
