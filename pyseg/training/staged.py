"""`train_staged`: a network that is trained from coarse to fine, as the FCNs of its paper are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import models
from ..errors import PysegError
from ..files import read_json
from ..models.fcn import COARSER
from ..registry import made_from
from ..spec import StageSpec
from ..types import Dataset
from ..weights import load_into, load_state
from .loop import CHECKPOINT, LOG, WEIGHTS, has_begun
from .semantic import train

if TYPE_CHECKING:
    from ..models import SemanticModel


def train_staged(
    model: SemanticModel,
    dataset: Dataset,
    *,
    output_dir: str | Path,
    epochs: int,
    resume: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Trains FCN-8s or FCN-16s by way of the coarser ones, each from the weights of the one before.

    Every stage is a `train` with the same options (Long et al., 2015, section 4.3). The coarsest
    begins with the weights that ``model`` has, such as torchvision's VGG-16.

    Args:
        model: an ``fcn8s`` or ``fcn16s``, made by its name; holds the trained weights at the end.
        dataset: as `train`.
        output_dir: gets the files of `train`; those of the coarser stages are in folders of their
            names in it, such as ``fcn32s``.
        epochs: of each stage.
        resume: go on where an earlier run was stopped: stages that are done are not run again.
        options: of `train`, for all stages.

    Returns:
        The log of the last stage.

    Raises:
        PysegError: ``model`` has no coarser stage, or nothing to resume; and what `train` raises.

    Example:
        >>> model = pyseg.models.create("fcn8s", weights="IMAGENET1K_V1", num_classes=11)
        >>> log = train_staged(model, CamVid("camvid"), output_dir="runs/fcn8s", epochs=50)
    """
    spec = made_from(model)
    name = spec.name.rpartition(":")[2] if spec else None
    if spec is None or name not in COARSER:
        made = f"the model {name}" if name else f"a {type(model).__name__} that no name made"
        raise PysegError(
            f"staged training is for {' and '.join(COARSER)}, which have coarser stages, got "
            f"{made}; train it without staged"
        )
    output = Path(output_dir)
    before: list[str] = []
    while name in COARSER:
        name = COARSER[name]
        before.insert(0, name)
    if resume and not has_begun(output / before[0]):
        raise PysegError(
            f"resume=True, but there is no {output / before[0] / CHECKPOINT}; start with "
            "resume=False"
        )
    state = dict(model.state_dict())
    kept = {k: v for k, v in spec.options.items() if k == "style"}
    for stage in before:
        folder = output / stage
        done = resume and _epochs(folder) >= epochs
        if not done:
            made_stage = StageSpec(stage, {**kept, "weights": None})
            coarse = models._registry.make(made_stage, {"num_classes": len(model.classes)})
            own = coarse.state_dict()
            load_into(coarse, {key: state[key] for key in own}, "the coarser stage")
            going = resume and has_begun(folder)
            train(coarse, dataset, output_dir=folder, epochs=epochs, resume=going, **options)
            del coarse, own
        state |= load_state(folder / WEIGHTS)
    load_into(model, state, output / before[-1] / WEIGHTS)
    going = resume and has_begun(output)
    return train(model, dataset, output_dir=output, epochs=epochs, resume=going, **options)


def _epochs(folder: Path) -> int:
    """How many epochs of a training are behind it, by the log that each leaves."""
    log = read_json(folder / LOG) if (folder / LOG).is_file() else []
    return len(log) if isinstance(log, list) and (folder / WEIGHTS).is_file() else 0
