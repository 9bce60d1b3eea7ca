import io
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyseg import regions, types
from pyseg.errors import LabelError, PysegError
from pyseg.image import read_labels
from pyseg.types import Dataset, Instances, Sample, Segment, Segmentation, Segments


def make(**changes):
    fields = {"size": (6, 8), "classes": ("a", "b", "c"), "logits": torch.randn(3, 3, 4)}
    return Segmentation(**(fields | changes))


def test_labels_come_from_the_logits_at_full_size():
    segmentation = make()
    full = torch.nn.functional.interpolate(
        segmentation.logits[None], (6, 8), mode="bilinear", align_corners=False
    )
    assert torch.equal(segmentation.labels, full.argmax(1)[0].to(torch.uint8))
    assert segmentation.labels is segmentation.labels  # once
    torch.testing.assert_close(segmentation.probabilities(), full[0].softmax(0))


def test_changed_copies_drop_what_is_no_longer_true():
    first = make()
    before = first.labels
    second = first.with_logits(-first.logits)
    assert not torch.equal(second.labels, before) and torch.equal(first.labels, before)
    third = second.with_labels(before)
    assert third.logits is None and third.labels is before
    with pytest.raises(ValueError, match="labels without logits"):
        third.probabilities()


def test_labels_of_a_panoptic_map():
    ids = torch.tensor([[0, 7, 7], [300, 300, 0]], dtype=torch.int32)
    segments = Segments(ids, (Segment(300, 1, 1.0, 2), Segment(7, 2, 0.9, 2)))
    result = Segmentation((2, 3), ("a", "b", "c"), segments=segments)
    assert result.labels.tolist() == [[255, 2, 2], [1, 1, 255]]
    assert make().with_segments(Segments(torch.zeros(6, 8, dtype=torch.int32), ())).logits is None


def test_labels_of_more_than_255_classes():
    names = tuple(f"class {k}" for k in range(300))
    ids = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    items = tuple(Segment(k, label, 1.0, 1) for k, label in ((1, 255), (2, 299), (3, 44)))
    labels = Segmentation((1, 4), names, segments=Segments(ids, items)).labels
    assert labels.dtype == torch.int16 and labels.tolist() == [[-1, 255, 299, 44]]
    logits = torch.zeros(300, 1, 2)
    logits[255, 0, 0], logits[299, 0, 1] = 1, 1
    labels = Segmentation((1, 2), names, logits=logits).labels
    assert labels.dtype == torch.int16 and labels.tolist() == [[255, 299]]


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"logits must be \[3, h, w\]"):
        make(logits=torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match=r"labels must be \[6, 8\]"):
        make().with_labels(torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="neither logits, labels, segments nor"):
        _ = make(logits=None).labels


def test_pickling_keeps_everything():
    first = make()
    copy = pickle.loads(pickle.dumps(first))
    assert torch.equal(copy.logits, first.logits) and copy.classes == first.classes


def test_labels_of_instances_alone():
    masks = torch.zeros(3, 2, 3, dtype=torch.bool)
    masks[0, 0], masks[1, :, 0], masks[2, :, 2] = True, True, True
    instances = Instances(
        torch.zeros(3, 4), masks, torch.tensor([0.9, 0.6, 0.4]), torch.tensor([2, 1, 0])
    )
    result = Segmentation((2, 3), ("a", "b", "c"), instances=instances)
    assert result.labels.tolist() == [[2, 2, 2], [1, 255, 255]]
    assert result.with_labels(result.labels).instances is instances


def test_full_logits():
    first = make()
    want = torch.nn.functional.interpolate(
        first.logits[None], (6, 8), mode="bilinear", align_corners=False
    )[0]
    assert torch.equal(first.full_logits(), want)
    assert make(logits=first.logits.half()).full_logits().dtype == torch.float32
    large = make(logits=want)
    assert large.full_logits() is large.logits
    with pytest.raises(ValueError, match="labels without logits"):
        first.with_labels(first.labels).full_logits()


def test_labels_are_checked():
    first = make()
    good = np.array([[0, 1, 2, 255] * 2] * 6)
    for dtype in ("u1", "i4", "i8", "u2", ">u2"):
        labels = first.with_labels(good.astype(dtype)).labels
        assert labels.dtype == torch.uint8 and labels.tolist() == good.tolist()
    many = make(classes=tuple(map(str, range(300))), logits=None)
    assert many.with_labels(good - 1).labels.tolist() == (good - 1).tolist()
    for labels, words in (
        (good * 0 + 77, "77, which is no class: there are 3, 0 to 2, and 255 is void"),
        (torch.full((6, 8), 3), "hold 3, which is no class"),
        (torch.full((6, 8), -1), "hold -1, which is no class"),
        (good / 2, "float64"),
        (torch.zeros(6, 8), "integers, got torch.float32"),
        (good > 1, "bool"),
        (good.tolist(), "list"),
        (good[:5], r"\[6, 8\], the size of the image, got \[5, 8\]"),
    ):
        with pytest.raises(LabelError, match=words):
            first.with_labels(labels)
    with pytest.raises(LabelError, match=r"hold 300, .* 0 to 299, and -1 is void"):
        many.with_labels(torch.full((6, 8), 300))


def test_reprs_are_short():
    image = torch.zeros(3, 6, 8, dtype=torch.uint8)
    segments = Segments(torch.zeros(6, 8, dtype=torch.int32), ())
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    instances = Instances(torch.zeros(2, 4), masks, torch.ones(2), torch.zeros(2).long())
    full = make(image=image, segments=segments, instances=instances)
    assert repr(full) == (
        "Segmentation(6 x 8, 3 classes, logits [3, 3, 4] float32, segments Segments(map [6, 8] "
        "int32, 0 items), instances Instances(2 objects, masks [2, 6, 8] bool), image [3, 6, 8] "
        "uint8)"
    )
    assert repr(Sample("a", image, image[0])) == (
        "Sample('a', image [3, 6, 8] uint8, labels [6, 8] uint8)"
    )


def test_what_a_notebook_shows():
    def shown(segmentation):
        return np.asarray(Image.open(io.BytesIO(segmentation._repr_png_())).convert("RGB"))

    palette = ((9, 8, 7), (50, 60, 70), (200, 0, 0))
    large = make(size=(60, 80), palette=palette, logits=None)
    labels = torch.zeros(60, 80, dtype=torch.uint8)
    labels[:30], labels[30:40] = 2, 255
    plain = large.with_labels(labels)
    got = shown(plain)
    assert got[10, 40].tolist() == [200, 0, 0] and got[50, 40].tolist() == [9, 8, 7]
    assert got[35, 40].tolist() == [0, 0, 0]
    over = replace(plain, image=torch.full((3, 60, 80), 100, dtype=torch.uint8))
    assert np.array_equal(shown(over), np.asarray(over.overlay()))
    assert make(logits=None)._repr_png_() is None  # nothing to show


def test_a_missing_directory_is_named(tmp_path):
    for path, words in (
        (tmp_path / "no" / "a.png", "'.*no' does not exist; create it first"),
        (tmp_path / "a.jpg", "name it .png"),
    ):
        with pytest.raises(PysegError, match=words):
            make().save(path)
    (tmp_path / "a").write_text("")
    with pytest.raises(PysegError, match="does not exist"):
        make().save(tmp_path / "a" / "b.png")
    with pytest.raises(PysegError, match="is a directory"):
        (tmp_path / "b.png").mkdir()
        make().save(tmp_path / "b.png")


def test_data_loader():
    """As `Dataset` says: a batch is a list of samples, whatever their sizes."""

    class Growing:
        classes, palette = ("a",), ((0, 0, 0),)

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return Sample(str(index), torch.zeros(3, 2, 3 + index, dtype=torch.uint8))

    assert isinstance(Growing(), Dataset)
    batches = list(torch.utils.data.DataLoader(Growing(), batch_size=2, collate_fn=list))
    assert [[s.image.shape[2] for s in batch] for batch in batches] == [[3, 4], [5, 6]]


def test_old_addresses():
    for name in regions.__all__:
        assert getattr(types, name) is getattr(regions, name)


def test_void_of_many_classes_is_written(tmp_path):
    many = make(size=(1, 3), classes=tuple(map(str, range(300))), logits=None)
    path = many.with_labels(np.array([[-1, 255, 299]])).save(tmp_path / "a.png")
    assert read_labels(path).tolist() == [[65535, 255, 299]]


def test_optional_attributes_are_those_that_the_house_reads():
    """What types.py lists is looked for somewhere, by getattr, hasattr or as a member."""
    table = types.__doc__.partition("| of | attribute |")[2].partition("And these options")[0]
    names = re.findall(r"``(\w+)", "".join(line.split("|")[2] for line in table.split("\n")[2:-2]))
    assert {"palette", "refine_batch", "to", "headline", "things", "category_ids"} <= set(names)
    source = "".join(
        path.read_text()
        for path in Path(types.__file__).parent.rglob("*.py")
        if path.name != "types.py"
    )
    for name in names:
        assert re.search(rf"""["']{name}["']|\.{name}\b""", source), name
