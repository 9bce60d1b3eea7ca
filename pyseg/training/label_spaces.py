"""Several data sets in one training, each of which labels some of the model's classes.

A class that a data set does not know is unknown in its images, not absent: "road" there may well
hold the lane markings that another set tells apart. So the loss of an image is computed in the
classes of its own data set. Logits of classes that the set does not know are left out of the
softmax and get no gradient, neither up nor down; where a class of the set stands for several of the
model's ("vehicle" for "car" and "truck"), its logit is the logarithm of the sum of theirs'
exponentials, which makes its probability the sum of their probabilities.

The first is masking, the second marginalising (Fang & Yan, 2020; Shi et al., 2021). Masking learns
nothing about unknown classes: a pixel of "sky" does not say that it is no "person". Where unknown
classes can hide in one class of a set only, its ``background``, that class stands for them, too,
and all others exclude them, which is worth more. Marginalising them in every class, each label
standing for "this class or one that the set does not know", would let a network satisfy a whole
data set by predicting what that set cannot refute.
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..types import VOID, Dataset, Sample

Aliases = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class LabelSpace:
    """What each class of a data set stands for among the classes of a model."""

    members: tuple[tuple[int, ...], ...]  # by class of the data set

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        model: Sequence[str],
        aliases: Aliases | None = None,
        background: Sequence[str] = (),
    ) -> LabelSpace:
        """By name: a class stands for those that ``aliases`` gives it, or for its namesake.

        Args:
            classes: of the data set.
            model: classes of the model.
            aliases: what classes stand for where it is not their namesake.
            background: the class of this name stands for what the data set does not know, too.

        Raises:
            ValueError: a class has no counterpart, two classes have the same, or two are the
                background.
        """
        names = dict(read_aliases(aliases))
        members = []
        for name in classes:
            wanted = names.get(name, (name,))
            for other in wanted:
                if other not in model:
                    nearest = difflib.get_close_matches(other, model, n=3, cutoff=0.3)
                    raise ValueError(
                        f"the data set's class {name!r} has no counterpart among the model's; say "
                        f"by aliases which it stands for, such as {', '.join(nearest or model[:3])}"
                    )
            members.append(tuple(model.index(other) for other in wanted))
        known = [index for indices in members for index in indices]
        if twice := sorted({model[index] for index in known if known.count(index) > 1}):
            raise ValueError(
                f"two classes of one data set stand for {', '.join(twice)}; change aliases"
            )
        hiding = [place for place, name in enumerate(classes) if name in background]
        if len(hiding) > 1:
            raise ValueError(
                f"background names {' and '.join(classes[k] for k in hiding)} of one data set; "
                "unknown classes can hide in one of a set's classes"
            )
        for place in hiding:
            members[place] += tuple(k for k in range(len(model)) if k not in known)
        return cls(tuple(members))

    def covers(self, count: int) -> bool:
        """Whether the data set's classes are the model's ``count``, in their order."""
        return self.members == tuple((index,) for index in range(count))

    def logits(self, logits: Tensor) -> Tensor:
        """Logits of the model's classes [N, C, …] as those of the data set's [N, K, …]."""
        if self.covers(logits.shape[1]):
            return logits
        if all(len(indices) == 1 for indices in self.members):
            return logits[:, [indices[0] for indices in self.members]]
        merged = [logits[:, list(indices)].logsumexp(1) for indices in self.members]
        return torch.stack(merged, 1)


def read_aliases(aliases: Aliases | str | None) -> dict[str, tuple[str, ...]]:
    """What classes stand for, by name, also from ``"pavement=sidewalk,vehicle=car|truck"``.

    Raises:
        ValueError: another form than ``{"pavement": "sidewalk", "vehicle": ["car", "truck"]}``.
    """
    if aliases is None:
        return {}
    try:
        if isinstance(aliases, str):
            pairs = [part.split("=") for part in aliases.split(",")]
            aliases = {name.strip(): [o.strip() for o in of.split("|")] for name, of in pairs}
        read = {
            str(name): (others,) if isinstance(others, str) else tuple(others)
            for name, others in aliases.items()
        }
        if all(o and all(isinstance(name, str) for name in o) for o in read.values()):
            return read
    except (AttributeError, TypeError, ValueError):
        pass
    raise ValueError(
        "aliases must give classes of data sets those of the model that they stand for, such as "
        f"{{'pavement': 'sidewalk', 'vehicle': ['car', 'truck']}}, got {aliases!r}"
    )


def union(datasets: Sequence[Dataset], aliases: Aliases | None = None) -> dict[str, Any]:
    """Names and colours of the classes of several data sets, each once, as they come.

    Args:
        datasets: the data sets.
        aliases: classes that stand for others are replaced by these.

    Returns:
        ``"classes"`` and ``"palette"``, for `pyseg.models.create` and the model's attributes.

    Example:
        >>> found = union([cityscapes, mapillary], {"traffic sign": "traffic-sign-front"})
        >>> model = pyseg.models.create("unet", num_classes=len(found["classes"]))
    """
    names = read_aliases(aliases)
    colours: dict[str, tuple[int, int, int]] = {}
    for dataset in datasets:
        for name, colour in zip(dataset.classes, dataset.palette, strict=True):
            for other in names.get(name, (name,)):
                colours.setdefault(other, colour)
    return {"classes": tuple(colours), "palette": tuple(colours.values())}


class Merged:
    """A data set whose classes that stand for the same are one, named after the first of them.

    "window" and "door" are parts of the "building" of a data set that does not tell them apart.
    """

    def __init__(self, dataset: Dataset, aliases: Aliases | None) -> None:
        names = read_aliases(aliases)
        wanted = [names.get(name, (name,)) for name in dataset.classes]
        kept = list(dict.fromkeys(wanted))
        firsts = [wanted.index(one) for one in kept]
        self.classes = tuple(dataset.classes[first] for first in firsts)
        self.palette = tuple(dataset.palette[first] for first in firsts)
        self._dataset = dataset
        self._numbers = torch.arange(VOID + 1, dtype=torch.uint8)
        self._numbers[: len(wanted)] = torch.tensor([kept.index(one) for one in wanted])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self._dataset[index]
        if sample.labels is None:
            return sample
        return replace(sample, labels=self._numbers[sample.labels.long()], segments=None)


def merged(dataset: Dataset, aliases: Aliases | None) -> Dataset:
    """``dataset``, as `Merged` where classes of it stand for the same by ``aliases``."""
    one = Merged(dataset, aliases)
    return dataset if len(one.classes) == len(dataset.classes) else one


class Together:
    """Several data sets, one after the other: ``samples[k]`` has the classes of its own.

    Args:
        datasets: the data sets.
        spaces: number of the label space of each; None = each has its own.
        repeats: how often each of them comes; None = once.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        spaces: Sequence[int] | None = None,
        repeats: Sequence[int] | None = None,
    ) -> None:
        count = range(len(datasets))
        places = [k for k in count for _ in range(repeats[k] if repeats else 1)]
        self.datasets = tuple(datasets[k] for k in places)
        self.spaces = [spaces[k] if spaces else k for k in places]
        self.begins = [0]
        for dataset in self.datasets:
            self.begins.append(self.begins[-1] + len(dataset))

    def __len__(self) -> int:
        return self.begins[-1]

    def space(self, index: int) -> int:
        """Number of a sample's label space."""
        return self.spaces[self._place(index)]

    def fellows(self, index: int) -> range:
        """The samples of the same pass over the same data set."""
        place = self._place(index)
        return range(self.begins[place], self.begins[place + 1])

    def _place(self, index: int) -> int:
        return bisect.bisect_right(self.begins, index) - 1

    def __getitem__(self, index: int) -> Sample:
        place = self._place(index)
        return self.datasets[place][index - self.begins[place]]


def loss_by_space(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    logits: Tensor,
    labels: Tensor,
    of: Tensor,
    spaces: Sequence[LabelSpace],
    weights: Sequence[Tensor],
    void: int,
) -> Tensor:
    """The loss of a batch, image by image in the classes of its data set.

    Args:
        loss: of logits [N, K, H, W], labels [N, H, W] and class weights [K].
        logits: of the model's classes, [N, C, H, W].
        labels: [N, H, W], classes of each image's own data set.
        of: data set of each image, [N].
        spaces: of the data sets.
        weights: of the classes of each data set.
        void: label that counts for nothing.

    Returns:
        The mean of the data sets' losses, weighted by their labelled pixels in the batch.
    """
    if len(spaces) == 1:
        return loss(spaces[0].logits(logits), labels, weights[0])
    total, pixels = logits.sum() * 0, (labels != void).sum().clamp(min=1)
    for space in of.unique().tolist():
        chosen = of == space
        own = labels[chosen]
        value = loss(spaces[space].logits(logits[chosen]), own, weights[space])
        total = total + value * ((own != void).sum() / pixels)
    return total
