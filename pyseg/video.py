"""Objects followed through a video by SAM 2 (Ravi et al., 2024, arXiv:2408.00714).

sam2's own video predictor does the work. It wants a folder of JPEGs, holds all frames and all that
it has found; here frames come from anywhere and are read when their turn comes, and of what was
found only what later frames look at is kept. Results are the same, bit for bit.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .devices import checked_device
from .errors import LabelError, PysegError, require
from .files import IMAGE_SUFFIXES
from .image import read_image
from .promptable import Sam2Backend, load_sam2
from .regions import Segment, Segments
from .types import Segmentation

_ENDLESS = 1 << 30  # frames of a stream whose end is not known


@dataclass(frozen=True)
class VideoPrompt:
    """Where an object is, in one frame. Coordinates are x, y in pixels, the first pixel at 0.

    Args:
        frame: its index, from 0.
        object: a number from 1 on, the same in all prompts of an object; its id in the segments.
        label: the object's class, by name or index; one prompt of each object must name it, unless
            `track` is called without classes.
        points: (x, y) each.
        point_labels: of each point, 1 on the object, 0 off it; None = all on it.
        box: x0, y0, x1, y1.
        mask: [H, W] bool, in place of points and box.
    """

    frame: int
    object: int
    label: str | int | None = None
    points: Sequence[tuple[float, float]] = ()
    point_labels: Sequence[int] | None = None
    box: tuple[float, float, float, float] | None = None
    mask: Tensor | np.ndarray | None = None


def track(
    frames: Any,
    prompts: Iterable[VideoPrompt],
    *,
    classes: Sequence[str] | None = None,
    segmenter: Sam2Backend | None = None,
    weights: str | Path | None = "default",
    size: str | None = None,
    backward: bool = True,
    device: str | torch.device | None = None,
) -> Iterator[tuple[int, Segmentation]]:
    """Follows objects from the frames in which they are shown through a video.

    It goes forward from the first prompted frame to the end, then back from there to frame 0. A
    pixel that several objects claim is of the surest.

    Memory does not grow with the video. Held are the features of one frame and, of each object, its
    prompted frames and 16 more (SAM 2.1's memory; twice 16 where it goes back): about 0.8 MB each
    at an input of 1024 x 1024. Frames of a sequence are read one by one, prompted ones twice; an
    iterator is read once, and frames that are needed later (those before the last prompted one,
    and those that are gone back to) wait as 8-bit images of the network's input, 3 MB each.

    Args:
        frames: the images, all of one size: a folder, whose image files are taken in the order of
            their names; a sequence, or an iterator, of anything that `pyseg.image.read_image`
            takes.
        prompts: at least one; of an object, any number in any frames.
        classes: names of the classes; None = one for each object, ``object 1`` and so on.
        segmenter: a SAM 2, such as the promptable of a pipeline; None = loaded as follows.
        weights: of SAM 2, as `pyseg.promptable.load_sam2` takes them.
        size: as there.
        backward: whether to go back, too.
        device: where it runs; None = where the segmenter is.

    Yields:
        Index of a frame, and its `Segmentation` with one segment for each object seen in it; its
        ``labels`` are the label map, void where there is no object.

    Raises:
        PysegError: no frames or prompts, a prompt outside the video or the image, two prompts of an
            object in one frame, frames of different sizes.
        LabelError: an object without class, with two, or with an unknown one.
        WeightsError: the weights are absent, unreachable or damaged.
        ImportError: sam2 is not installed.

    Example:
        >>> car = VideoPrompt(frame=0, object=1, label="Car", box=(300, 120, 380, 180))
        >>> for index, result in pyseg.video.track("clip", [car], classes=("Car", "Pedestrian")):
        ...     result.save(f"labels/{index:05d}.png")
    """
    asked = list(prompts)
    labels, names = _classes_of(asked, classes)
    loaded = load_sam2(weights, size)[1] if segmenter is None else segmenter
    if not isinstance(loaded, Sam2Backend):
        raise PysegError(
            f"only a SAM 2 of the package sam2 follows objects, got a {type(loaded).__name__}; "
            "give weights or size of pyseg.promptable.load_sam2, not those of transformers"
        )
    if device is not None:
        loaded.to(checked_device(device))
    given = _Frames(_listed(frames), loaded.model.image_size)
    tracker = _Tracker(loaded, given)
    tracker.check(asked)
    return _follow(tracker, asked, labels, names, backward)


def _follow(
    tracker: _Tracker,
    prompts: Sequence[VideoPrompt],
    labels: dict[int, int],
    names: tuple[str, ...],
    backward: bool,
) -> Iterator[tuple[int, Segmentation]]:
    for index, scores in tracker.run(prompts, backward):
        best, first = scores.max(0)
        ids = torch.tensor(tracker.objects, dtype=torch.int32, device=first.device)
        table = torch.where(best > 0, ids[first], 0).cpu()
        areas = torch.bincount(table.flatten().long(), minlength=max(tracker.objects) + 1).tolist()
        items = tuple(
            Segment(number, labels[number], 1.0, areas[number])
            for number in tracker.objects
            if areas[number]
        )
        yield index, Segmentation(tracker.size, names, segments=Segments(table, items))


class _Tracker:
    """sam2's video predictor over frames that are read when needed, with a state that is pruned."""

    def __init__(self, segmenter: Sam2Backend, frames: _Frames) -> None:
        self.predictor = _predictor_of(segmenter.model)
        self.frames = frames
        self.size = frames.size
        model = self.predictor
        # As many frames back as memory attention looks: at masks, and at pointers to objects.
        masks = model.num_maskmem * model.memory_temporal_stride_for_eval + 2
        self.reach = max(masks, model.max_obj_ptrs_in_encoder)
        self.objects: tuple[int, ...] = ()
        self.state = self._new_state()

    def _new_state(self) -> dict[str, Any]:
        """What the predictor's ``init_state`` makes of a folder."""
        device = self.predictor.device
        # Fewer frames than pointers that memory attention may look at change it.
        known = self.frames.count_up_to(self.predictor.max_obj_ptrs_in_encoder)
        per_object = (
            "point_inputs_per_obj",
            "mask_inputs_per_obj",
            "output_dict_per_obj",
            "temp_output_dict_per_obj",
            "frames_tracked_per_obj",
            "cached_features",
            "constants",
        )
        return {
            "images": self.frames,
            "num_frames": known,
            "offload_video_to_cpu": True,
            "offload_state_to_cpu": False,
            "video_height": self.size[0],
            "video_width": self.size[1],
            "device": device,
            "storage_device": device,
            "obj_id_to_idx": OrderedDict(),
            "obj_idx_to_id": OrderedDict(),
            "obj_ids": [],
            **{name: {} for name in per_object},
        }

    def check(self, prompts: Sequence[VideoPrompt]) -> None:
        height, width = self.size
        seen = set()
        for prompt in prompts:
            where = f"prompt of object {prompt.object} in frame {prompt.frame}"
            if prompt.object < 1 or int(prompt.object) != prompt.object:
                raise PysegError(f"{where}: objects are numbers from 1 on")
            if prompt.frame < 0 or not self.frames.has(prompt.frame):
                raise PysegError(f"{where}: there is no such frame, they are numbered from 0")
            if (prompt.frame, prompt.object) in seen:
                raise PysegError(f"{where}: there are two; give all its points in one")
            seen.add((prompt.frame, prompt.object))
            points = [*prompt.points]
            if prompt.mask is not None:
                mask = torch.as_tensor(prompt.mask)
                if tuple(mask.shape) != self.size or mask.dtype != torch.bool:
                    raise PysegError(
                        f"{where}: mask must be bool {list(self.size)}, the size of the frames, "
                        f"got {mask.dtype} {list(mask.shape)}"
                    )
                if points or prompt.box is not None:
                    raise PysegError(f"{where}: give a mask, or points and a box, not both")
            elif not points and prompt.box is None:
                raise PysegError(f"{where}: it has neither points nor box nor mask")
            if len(prompt.point_labels or points) != len(points):
                raise PysegError(f"{where}: {len(points)} points need as many point_labels")
            if bad := [v for v in prompt.point_labels or () if v not in (0, 1)]:
                raise PysegError(f"{where}: point_labels are 1 on the object and 0 off it: {bad}")
            for x, y in points:
                if not (0 <= x < width and 0 <= y < height):
                    raise PysegError(
                        f"{where}: the point x={x}, y={y} is outside the frames of {width} x "
                        f"{height} pixels"
                    )
            if prompt.box is not None:
                x0, y0, x1, y1 = prompt.box
                if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                    raise PysegError(
                        f"{where}: the box {tuple(prompt.box)} must be x0 < x1, y0 < y1 within "
                        f"{width} x {height} pixels"
                    )

    def run(self, prompts: Sequence[VideoPrompt], backward: bool) -> Iterator[tuple[int, Tensor]]:
        """Frames in the order of tracking, and mask logits [K, H, W] of `objects` in each."""
        for prompt in prompts:
            self._add(prompt)
        self.objects = tuple(self.state["obj_ids"])
        with torch.inference_mode():
            self.predictor.propagate_in_video_preflight(self.state)
        start = min(prompt.frame for prompt in prompts)
        index = start
        while self.frames.has(index):
            yield index, self._step(index, False)
            # Those after the first frame are what going back begins with.
            around = start + self.reach if backward else start
            self._forget(lambda t, low=index - self.reach, high=around: t > low or t <= high)
            self.frames.forget(index, keep=start + 1 if backward else 0)
            index += 1
        self._forget(lambda t: t <= start + self.reach)
        for index in range(start, -1, -1) if backward and start else ():
            # Objects that are not prompted in the first frame turn back in it.
            scores = self._step(index, True)
            if index < start:
                yield index, scores
            self._forget(lambda t, now=index: t < now + self.reach)
            self.frames.forget(index, keep=0)

    @torch.inference_mode()
    def _add(self, prompt: VideoPrompt) -> None:
        if prompt.mask is not None:
            mask = torch.as_tensor(prompt.mask)
            self.predictor.add_new_mask(self.state, prompt.frame, prompt.object, mask)
            return
        options: dict[str, Any] = {"box": prompt.box}
        if len(prompt.points):
            signs = prompt.point_labels or [1] * len(prompt.points)
            options["points"] = torch.tensor([[float(v) for v in xy] for xy in prompt.points])
            options["labels"] = torch.tensor(list(signs), dtype=torch.int32)
        self.predictor.add_new_points_or_box(self.state, prompt.frame, prompt.object, **options)

    def _step(self, index: int, reverse: bool) -> Tensor:
        """One frame, as the predictor's ``propagate_in_video`` has it, without a progress bar."""
        with torch.inference_mode():
            found = []
            for number in range(len(self.objects)):
                outputs = self.state["output_dict_per_obj"][number]
                if index in outputs["cond_frame_outputs"]:
                    masks = outputs["cond_frame_outputs"][index]["pred_masks"]
                else:
                    outputs["non_cond_frame_outputs"][index], masks = (
                        self.predictor._run_single_frame_inference(
                            inference_state=self.state,
                            output_dict=outputs,
                            frame_idx=index,
                            batch_size=1,
                            is_init_cond_frame=False,
                            point_inputs=None,
                            mask_inputs=None,
                            reverse=reverse,
                            run_mem_encoder=True,
                        )
                    )
                found.append(masks)
            _, scores = self.predictor._get_orig_video_res_output(self.state, torch.cat(found))
        return scores[:, 0].clone()

    def _forget(self, wanted: Any) -> None:
        """Drops outputs of frames that no later one looks at; prompted frames always count."""
        for outputs in self.state["output_dict_per_obj"].values():
            held = outputs["non_cond_frame_outputs"]
            for t in [t for t in held if not wanted(t)]:
                del held[t]


class _Frames:
    """What the predictor takes for its tensor of all frames: ``frames[index]`` is [3, S, S] float.

    Args:
        frames: a sequence, or any iterable, which is read once.
        side: S, of the network's input.
    """

    def __init__(self, frames: Any, side: int) -> None:
        indexed = hasattr(frames, "__len__") and hasattr(frames, "__getitem__")
        self.sequence = frames if indexed else None
        self.stream = None if indexed else iter(frames)
        self.side = side
        self.kept: dict[int, np.ndarray] = {}  # [S, S, 3] uint8, of a stream
        self.count = len(frames) if indexed else 0  # read so far, of a stream
        self.size = (0, 0)
        if not self.has(0):
            raise PysegError("frames is empty: there is nothing to track in")
        if indexed:
            self._read(0, frames[0])

    def has(self, index: int) -> bool:
        """Whether there is such a frame; a stream is read up to it."""
        while self.stream is not None and self.count <= index:
            try:
                frame = next(self.stream)
            except StopIteration:
                self.stream = None
                break
            self.kept[self.count] = self._read(self.count, frame)
            self.count += 1
        return index < self.count

    def count_up_to(self, enough: int) -> int:
        """The number of frames; of a stream that has ``enough``, any large number."""
        return _ENDLESS if self.has(enough) and self.stream is not None else self.count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if self.sequence is not None:
            pixels = self._read(index, self.sequence[index])
        elif self.has(index) and index in self.kept:
            pixels = self.kept[index]
        else:  # of a stream, and given up
            raise RuntimeError(f"frame {index} is not held any more")
        plane = torch.from_numpy(pixels / 255.0).permute(2, 0, 1).float()
        # In the order of sam2's own reader, for the same bits.
        mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
        std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
        return (plane - mean) / std

    def forget(self, index: int, keep: int) -> None:
        """Frame ``index`` is done; those before ``keep`` are needed again."""
        if index >= keep:
            self.kept.pop(index, None)

    def _read(self, index: int, frame: Any) -> np.ndarray:
        image = read_image(frame)
        size = (image.shape[1], image.shape[2])
        if self.size == (0, 0):
            self.size = size
        elif size != self.size:
            raise PysegError(
                f"frame {index} is {list(size)}, the first one {list(self.size)}: frames must be "
                "of one size"
            )
        picture = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
        return np.asarray(picture.resize((self.side, self.side)))


class _Widened(nn.Module):
    """Memory attention in float32 of memories that the predictor keeps in bfloat16.

    sam2 leaves that to autocast. Without it, an object that is first prompted in a later frame has
    a memory of bfloat16 alone, which the layers refuse.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *, curr: Any, memory: Tensor, **rest: Any) -> Tensor:
        first = curr[0] if isinstance(curr, list) else curr
        if not torch.is_autocast_enabled(first.device.type):
            memory = memory.to(first.dtype)
        return self.inner(curr=curr, memory=memory, **rest)


def _predictor_of(model: Any) -> Any:
    """sam2's video predictor of the same weights, as its ``build_sam2_video_predictor`` sets it.

    All but the filling of holes, for which sam2 needs a kernel that it may lack: the result would
    depend on how it was installed.
    """
    kind = require("sam2.sam2_video_predictor").SAM2VideoPredictor
    made = kind.__new__(kind)
    made.__dict__.update(model.__dict__)
    decoder = copy.copy(model.sam_mask_decoder)  # of images it stays as it is
    decoder.dynamic_multimask_via_stability = True
    decoder.dynamic_multimask_stability_delta = 0.05
    decoder.dynamic_multimask_stability_thresh = 0.98
    attention = _Widened(model.memory_attention)
    made._modules = {
        **model._modules,
        "sam_mask_decoder": decoder,
        "memory_attention": attention,
    }
    made.binarize_mask_from_pts_for_mem_enc = True
    made.fill_hole_area = 0
    made.non_overlap_masks = False
    made.clear_non_cond_mem_around_input = False
    made.add_all_frames_to_correct_as_cond = False
    return made


def _listed(frames: Any) -> Any:
    """The image files of a folder; anything else as it is."""
    if not isinstance(frames, (str, os.PathLike)):
        return frames
    folder = Path(frames)
    if not folder.is_dir():
        raise PysegError(f"frames {str(folder)!r} is no folder; give one, or a list of images")
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    return [path for path in found if not path.name.startswith(".")]


def _classes_of(
    prompts: Sequence[VideoPrompt], classes: Sequence[str] | None
) -> tuple[dict[int, int], tuple[str, ...]]:
    """The class of every object, and the names of the classes."""
    if not prompts:
        raise PysegError("prompts is empty: show each object in at least one frame")
    objects = sorted({prompt.object for prompt in prompts})
    if classes is None:
        if any(prompt.label is not None for prompt in prompts):
            raise LabelError("prompts have labels: give classes, the names that they are of")
        return {number: k for k, number in enumerate(objects)}, tuple(
            f"object {number}" for number in objects
        )
    names = tuple(classes)
    found: dict[int, int] = {}
    for prompt in prompts:
        if prompt.label is None:
            continue
        label = prompt.label
        if isinstance(label, str):
            folded = [name.casefold() for name in names]
            label = folded.index(label.casefold()) if label.casefold() in folded else -1
        if not 0 <= label < len(names):
            raise LabelError(
                f"label {prompt.label!r} of object {prompt.object} is no class (classes: "
                f"{', '.join(names)})"
            )
        if found.setdefault(prompt.object, label) != label:
            raise LabelError(f"object {prompt.object} has two classes; number them apart")
    if absent := [number for number in objects if number not in found]:
        raise LabelError(f"object {absent[0]} has no class: give label in one of its prompts")
    return found, names


__all__ = ["VideoPrompt", "track"]
