"""COCO's panoptic format: a JSON, a folder of PNGs whose colours are segment ids, images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import ImageError, LabelError
from ..files import IMAGE_SUFFIXES, check_json, read_json, some
from ..formats import annotations_of, categories_of, read_segments
from ..image import default_palette, read_image
from ..types import Sample, Segments
from .layout import Published, Root
from .pairs import instances_of


class COCOPanoptic:
    """Panoptic labels in COCO's format, which many data sets are published in or converted to.

    The files are ``annotations/panoptic_<split>.json``, ``annotations/panoptic_<split>/*.png`` and
    ``<split>/*.jpg`` below ``root``, as COCO has them, or those that the arguments name. Images are
    found by the stem of their ``file_name``. Class indices put the stuff first, then the things,
    both in the order of the JSON, which is what pyseg's panoptic models want.

    Args:
        root: folder of the data set.
        split: such as ``"val2017"``.
        annotations: the JSON; its PNGs are in the folder of its name beside it.
        images: folder of the images.
        classes: names of the categories to use; the segments of all others are void. None = all.

    Attributes:
        things: names of the countable classes.
        category_ids: COCO's category of every class index, for `pyseg.formats.write_panoptic`.
        names: stems of the images.

    Raises:
        ValueError: neither ``root`` nor both files are given, or a class is no category.
        LayoutError: a folder, the JSON or an image is absent; the message shows what is expected.
        LabelError: the JSON is damaged, incomplete, or without annotations.

    Example:
        >>> dataset = COCOPanoptic("coco", "val2017")
        >>> dataset[0].segments.map.shape, len(dataset.classes)
        (torch.Size([427, 640]), 133)
    """

    published = Published(
        title="COCO panoptic",
        page="https://cocodataset.org/#download",
        tree="""
annotations/panoptic_{train2017,val2017}.json
annotations/panoptic_{train2017,val2017}/*.png
{train2017,val2017}/*.jpg, or images/{train2017,val2017}/*.jpg""",
        gives="semantic, panoptic, instances",
        licence="annotations CC BY 4.0; images: Flickr's terms",
        counts={"train2017": 118287, "val2017": 5000},
    )

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train2017",
        *,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if root is None and (annotations is None or images is None):
            raise ValueError("give root, or both annotations and images")
        found = Root(root or Path(annotations or ".").parent, self.published)
        self.path = Path(annotations or found.need(f"annotations/panoptic_{split}.json"))
        self.folder = self.path.with_suffix("")
        content = read_json(self.path, LabelError)
        known = categories_of(content, self.path)
        names = [entry["name"] for entry in known]
        if classes is not None and (absent := set(classes) - set(names)):
            raise ValueError(f"classes: {self.path} has no category {some(absent)}")
        if not self.folder.is_dir():
            found.fail(f"there is no folder {self.folder} of PNGs beside the JSON")
        chosen = [entry for entry in known if classes is None or entry["name"] in classes]
        chosen.sort(key=lambda entry: bool(entry["isthing"]))  # stable
        self.num_stuff = sum(not entry["isthing"] for entry in chosen)
        self.classes = tuple(entry["name"] for entry in chosen)
        self.things = self.classes[self.num_stuff :]
        self.category_ids = tuple(entry["id"] for entry in chosen)
        self.palette = default_palette(len(chosen))
        if all("color" in entry for entry in chosen):
            colours = [entry["color"] for entry in chosen]
            check_json(colours, [[int]], f"the colours of {str(self.path)!r}", LabelError)
            if not all(len(rgb) == 3 and 0 <= min(rgb) <= max(rgb) <= 255 for rgb in colours):
                raise LabelError(
                    f"{str(self.path)!r} has a category whose color is not [r, g, b] in 0..255"
                )
            self.palette = tuple((red, green, blue) for red, green, blue in colours)
        void = -1  # label of segments that are not used
        self._index = {entry["id"]: void for entry in known}
        self._index |= {key: label for label, key in enumerate(self.category_ids)}
        self._entries = list(annotations_of(content, self.path).values())
        if not self._entries:
            raise LabelError(f"{str(self.path)!r} has no annotations")
        listed = {"images?": [{"id?": (int, str), "file_name?": str}]}
        check_json(content, listed, repr(str(self.path)), LabelError)
        files = {
            entry["id"]: entry["file_name"]
            for entry in content.get("images", ())
            if "id" in entry and "file_name" in entry
        }
        self.names = tuple(
            Path(files.get(entry["image_id"], entry["file_name"])).stem for entry in self._entries
        )
        if images is not None and not Path(images).is_dir():
            found.fail(f"images: there is no folder {images}")
        folder = Path(images or found.need(split, f"images/{split}"))
        files = found.files(folder, *IMAGE_SUFFIXES)
        self.images = tuple(found.pick(files, self.names, "images"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` with labels, segments and instances.

        Raises:
            IndexError: ``index`` is out of range.
            ImageError: a file cannot be read, or the two differ in size.
            LabelError: PNG and JSON do not agree.
        """
        image = read_image(self.images[index])
        entry = self._entries[index]
        segments = read_segments(entry, self.folder, self._index, self.path)
        if image.shape[1:] != segments.map.shape:
            raise ImageError(
                f"{self.images[index]} is {list(image.shape[1:])} pixels, its map "
                f"{entry['file_name']} {list(segments.map.shape)}; they must be equal"
            )
        listed = {item.id for item in segments.items}
        found = set(segments.map.unique().tolist()) - {0}
        if listed != found:
            differing = some(str(number) for number in listed ^ found)
            raise LabelError(
                f"{entry['file_name']} of {str(self.path)!r}: the map and its list "
                f"differ in the ids {differing}"
            )
        unused = [item.id for item in segments.items if item.label < 0]
        if unused:
            hidden = torch.isin(segments.map, torch.tensor(unused, dtype=torch.int32))
            kept = tuple(item for item in segments.items if item.label >= 0)
            segments = Segments(segments.map.masked_fill(hidden, 0), kept)
        labels = segments.label_map(len(self.classes))
        instances = instances_of(segments, range(self.num_stuff, len(self.classes)))
        return Sample(self.names[index], image, labels, segments, instances)
