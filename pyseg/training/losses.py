"""Losses of semantic training, and the text that adds them up: ``"ce+0.5*lovasz"``.

Every loss takes log-probabilities [N, C, H, W] in float32, labels [N, H, W] in which 255 is void,
and the weight of each class [C] (which only those use that are means over pixels), and returns a
number that is 0 or more. Void pixels count nowhere; a batch of nothing else costs 0. A class
without a pixel in the batch is left out of losses that are means over classes.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SpecError
from ..spec import StageSpec
from ..types import VOID


def ce(log_p: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy, each pixel times the weight of its class, divided by the number of pixels.

    Not by the sum of their weights: a batch of rare classes then counts for more.
    """
    loss = F.nll_loss(log_p, target, weights, ignore_index=VOID, reduction="sum")
    return loss / (target != VOID).sum().clamp(min=1)


def focal(log_p: Tensor, target: Tensor, weights: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Cross-entropy times (1 - p)^gamma (Lin et al., 2017, equation 5; softmax in the place of
    their sigmoid), so that pixels that are learnt count for less.

    Args:
        log_p: log-probabilities [N, C, H, W].
        target: labels [N, H, W].
        weights: of the classes, the paper's alpha.
        gamma: 0 = cross-entropy.
    """
    _check(gamma >= 0, f"gamma must be 0 or more, got {gamma}")
    nll = F.nll_loss(log_p, target, ignore_index=VOID, reduction="none")
    # Kept off 0, where the gradient of a power below 1 is infinite.
    missing = (-torch.expm1(-nll)).clamp(min=1e-6) ** gamma
    factor = _of_classes(weights, target) * missing
    return (factor * nll).sum() / (target != VOID).sum().clamp(min=1)


def ohem(
    log_p: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    threshold: float = 0.7,
    share: float = 0.0625,
) -> Tensor:
    """Cross-entropy of hard pixels (online hard example mining, Shrivastava et al., 2016): of those
    whose class has a probability below ``threshold``, and of the hardest ``share`` in any case.

    Args:
        log_p: log-probabilities [N, C, H, W].
        target: labels [N, H, W].
        weights: of the classes; which pixels are hard does not depend on them.
        threshold: 0 = only the share; 1 = all but pixels that are certain.
        share: of the batch's labelled pixels, rounded up; as hard ones as its last are kept, too.
    """
    _check(0 <= threshold <= 1, f"threshold is a probability and must be in 0..1, got {threshold}")
    _check(0 <= share <= 1, f"share must be in 0..1, got {share}")
    nll = F.nll_loss(log_p, target, ignore_index=VOID, reduction="none")
    valid = target != VOID
    found = nll.detach()[valid]
    hard = nll.detach() > (-math.log(threshold) if threshold else math.inf)
    least = math.ceil(share * len(found))
    if least:
        hard |= nll.detach() >= found.topk(least).values[-1]
    hard &= valid
    return (_of_classes(weights, target) * nll * hard).sum() / hard.sum().clamp(min=1)


def dice(log_p: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """1 - mean over the batch's classes of 2 Σ p·y / Σ (p + y) (Milletari et al., 2016, without
    their squares), all images of the batch as one."""
    return _overlap(log_p, target, lambda hit, p, y: 2 * hit / (p + y))


def jaccard(log_p: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """1 - mean over the batch's classes of Σ p·y / Σ (p + y - p·y) (Rahman & Wang, 2016), all
    images of the batch as one."""
    return _overlap(log_p, target, lambda hit, p, y: hit / (p + y - hit))


def lovasz(log_p: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Lovász-softmax (Berman et al., 2018, equation 11), mean over the batch's classes, all images
    of the batch as one: the convex extension of 1 - IoU to errors between 0 and 1."""
    valid = target != VOID
    labels = target[valid]
    p = log_p.exp().permute(0, 2, 3, 1)[valid]
    present = torch.bincount(labels, minlength=p.shape[1]).nonzero().flatten().tolist()
    losses = []
    for label in present:
        inside = labels == label
        errors, order = torch.where(inside, 1 - p[:, label], p[:, label]).sort(descending=True)
        inside = inside[order]
        # What the Jaccard index loses by each further error, in closed form: differences of the
        # indices themselves would cancel to nothing in float32 where there are millions of pixels.
        hits = inside.cumsum(0)
        total = hits[-1]
        left = (total - hits).to(errors.dtype)
        union = total + torch.arange(1, len(hits) + 1, device=hits.device) - hits
        union = union.to(errors.dtype)
        loses = torch.where(inside, 1 / union, left / (union * (union - 1).clamp(min=1)))
        losses.append((errors * loses).sum())  # a product of vectors may add up one by one
    return torch.stack(losses).mean() if losses else (p * 0).sum()


def boundary(log_p: Tensor, target: Tensor, weights: Tensor, *, radius: int = 20) -> Tensor:
    """Boundary loss (Kervadec et al., 2019, equations 4 and 5): mean over the pixels of
    Σ (p - y)·φ over the classes.

    φ is the signed distance of a pixel from the class's border, which runs between pixels: negative
    within the class, in units of ``radius`` and cut off there, so that a class that an image lacks
    has 1 everywhere. What is far off costs more than what is next to the border. Void is outside
    of every class.

    Args:
        log_p: log-probabilities [N, C, H, W].
        target: labels [N, H, W].
        weights: not used.
        radius: in pixels; the time it takes grows with it.
    """
    _check(type(radius) is int and radius >= 1, f"radius must be pixels, 1 or more, got {radius}")
    valid = target != VOID
    present = torch.bincount(target[valid], minlength=log_p.shape[1]).nonzero().flatten().tolist()
    p = log_p.exp()
    # Classes that the batch lacks: φ is 1 and y is 0. All classes together have probability 1.
    cost = 1 - p[:, present].sum(1)
    for label in present:
        inside = target == label
        signed = _distance(inside, radius) - _distance(~inside, radius)
        cost = cost + (p[:, label] - inside.to(p.dtype)) * signed
    return (cost * valid).sum() / valid.sum().clamp(min=1)


@torch.no_grad()
def _distance(inside: Tensor, radius: int) -> Tensor:
    """Distance of pixels outside of a region [N, H, W] from its border, / radius, at most 1."""
    far = radius + 1
    height, width = inside.shape[1:]
    # Along columns by steps, then along rows by Pythagoras: both passes see ``radius`` far.
    steps = torch.where(inside, 0.0, float(far))
    for shift in range(1, min(far, height)):
        near = torch.where(inside, float(shift), float(far))
        steps[:, shift:] = torch.minimum(steps[:, shift:], near[:, :-shift])
        steps[:, :-shift] = torch.minimum(steps[:, :-shift], near[:, shift:])
    squares = steps.square()
    nearest = squares.clone()
    for shift in range(1, min(far, width)):
        near = squares + shift * shift
        nearest[:, :, shift:] = torch.minimum(nearest[:, :, shift:], near[:, :, :-shift])
        nearest[:, :, :-shift] = torch.minimum(nearest[:, :, :-shift], near[:, :, shift:])
    # Half a pixel less: from the border instead of from the centre of the nearest pixel within.
    return ((nearest.sqrt() - 0.5).clamp(min=0) / radius).clamp(max=1)


def _overlap(
    log_p: Tensor, target: Tensor, ratio: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """1 - mean of ``ratio(Σ p·y, Σ p, Σ y)`` over the classes of the batch."""
    classes = log_p.shape[1]
    valid = target != VOID
    p = log_p.exp() * valid[:, None]
    index = torch.where(valid, target, 0)
    hit = p.gather(1, index[:, None])[:, 0]  # probability of the true class, 0 where void
    overlap = hit.new_zeros(classes).scatter_add_(0, index.flatten(), hit.flatten())
    truth = torch.bincount(target[valid], minlength=classes)
    present = truth > 0
    if not present.any():
        return overlap.sum() * 0
    return 1 - ratio(overlap, p.sum((0, 2, 3)), truth)[present].mean()


def _of_classes(weights: Tensor, target: Tensor) -> Tensor:
    """The weight of every pixel, [N, H, W], 0 where void."""
    valid = target != VOID
    return weights[torch.where(valid, target, 0)] * valid


def _check(right: bool, message: str) -> None:
    if not right:
        raise SpecError(message)


TERMS: dict[str, Callable[..., Tensor]] = {
    term.__name__: term for term in (ce, ohem, focal, dice, jaccard, lovasz, boundary)
}


@dataclass(frozen=True)
class Loss:
    """A weighted sum of `TERMS`.

    Example:
        >>> loss = Loss.parse("ce + 0.5*focal(gamma=1)")
        >>> loss(torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8)), torch.ones(3)) > 0
        tensor(True)
    """

    terms: tuple[tuple[float, StageSpec], ...]

    @classmethod
    def parse(cls, text: str) -> Loss:
        """Reads terms joined by ``+``, each with a factor before it where it is not 1.

        Raises:
            SpecError: it does not parse, an unknown loss or option, a factor that is not positive.
        """
        try:
            tree: ast.expr = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
            raise _unclear(text) from None
        nodes: list[ast.expr] = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
            nodes.append(tree.right)
            tree = tree.left
        nodes.append(tree)
        loss = cls(tuple(_term(node, text) for node in reversed(nodes)))
        names = [str(stage) for _, stage in loss.terms]
        if twice := [name for name in names if names.count(name) > 1]:
            raise SpecError(f"loss {text!r} has {twice[0]} twice; give it one factor")
        three = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1)
        for _, stage in loss.terms:
            TERMS[stage.name](*three, **stage.options)  # which refuses options out of range
        return loss

    def __str__(self) -> str:
        parts = (
            f"{stage}" if factor == 1 else f"{factor!r}*{stage}" for factor, stage in self.terms
        )
        return "+".join(parts)

    def __call__(self, logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        """The loss of a batch, in float32 whatever the logits are.

        Args:
            logits: [N, C, H, W].
            target: [N, H, W] integers, 255 = void.
            weights: of the classes, [C].
        """
        log_p, target = logits.float().log_softmax(1), target.long()
        weights = weights.float()
        values = [
            factor * TERMS[stage.name](log_p, target, weights, **stage.options)
            for factor, stage in self.terms
        ]
        return torch.stack(values).sum() if len(values) > 1 else values[0]


def _term(node: ast.expr, text: str) -> tuple[float, StageSpec]:
    factor = 1.0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        number = node.left.value if isinstance(node.left, ast.Constant) else None
        if type(number) not in (int, float):
            raise _unclear(text)
        factor, node = float(number), node.right  # type: ignore[arg-type]
        if not 0 < factor < math.inf:
            raise SpecError(f"loss {text!r}: factors must be positive, got {factor:g}")
    options: dict[str, Any] = {}
    if isinstance(node, ast.Call):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise _unclear(text)
        try:
            options = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        except ValueError:
            raise _unclear(text) from None
        node = node.func
    if not isinstance(node, ast.Name):
        raise _unclear(text)
    if node.id not in TERMS:
        nearest = difflib.get_close_matches(node.id, TERMS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise SpecError(f"loss {text!r}: there is no loss {node.id!r}; {hint}there are {_names()}")
    signature = inspect.signature(TERMS[node.id])
    known = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise SpecError(f"loss {text!r}: {node.id} has no option {name!r}; {has}")
        if type(value) not in (int, float):
            raise SpecError(f"loss {text!r}: {name} must be a number, got {value!r}")
    return factor, StageSpec(node.id, options)


def _names() -> str:
    return ", ".join(TERMS)


def _unclear(text: object) -> SpecError:
    return SpecError(
        f"loss {text!r} does not parse: write losses joined by +, such as 'ce+0.5*lovasz'; "
        f"there are {_names()}"
    )


def class_weights(counts: Tensor, among: Tensor, kind: float | str) -> Tensor:
    """The weight of each class in losses that are means over pixels; absent classes weigh 1.

    Args:
        counts: pixels of each class, [C].
        among: labelled pixels of the images that show the class, [C].
        kind: a power x: p^-x for the class's share p, scaled so that the expected weight of a pixel
            is 1; ``"median"`` = median-frequency balancing (Eigen & Fergus, 2015): the median of
            the classes' frequencies in the images that show them, divided by the class's.

    Returns:
        [C] float32.
    """
    if kind == "median":
        frequency = counts.double() / among.clamp(min=1)
        median = frequency[counts > 0].quantile(0.5)
        return torch.where(counts > 0, median / frequency, 1.0).float()
    share = counts.double() / counts.sum()
    weights = torch.where(counts > 0, share.clamp(min=1e-6) ** -float(kind), 0.0)
    weights = weights / (weights * share).sum()
    return torch.where(counts > 0, weights, 1.0).float()
