"""Every op at every SIMD level that this processor runs, against its reference and the lowest one.

PYSEG_SIMD is read at each call. A case makes fresh inputs, of sizes that no vector divides, and
says what to run and what should come out of it. Integers, and what only compares and selects, have
the same bits at all levels; elsewhere levels with fused multiplication and addition round less.
"""

import io

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn.functional import interpolate

from pyseg import ops
from pyseg.ops.boundary_mask import reference as boundary_mask_reference
from pyseg.ops.boundary_match import reference as boundary_match_reference
from pyseg.ops.confusion_matrix import reference as confusion_reference
from pyseg.ops.decode_png import reference as decode_png_reference
from pyseg.ops.dense_crf import reference as dense_crf_reference
from pyseg.ops.panoptic_merge import paste
from pyseg.ops.panoptic_merge import reference as panoptic_merge_reference
from pyseg.ops.panoptic_quality import FRACTION_BITS
from pyseg.ops.panoptic_quality import reference as panoptic_quality_reference
from pyseg.ops.upsample_argmax import reference as upsample_argmax_reference

LEVELS = ["generic", "v3", "v4"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def blobs(generator, classes, *size):
    """Label maps with regions, and noise in a fifth of the pixels."""
    coarse = torch.randn(size[0], classes, 3, 4, generator=generator)
    labels = interpolate(coarse, size[1:], mode="bicubic").argmax(1)
    noise = torch.randint(0, classes, size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < 0.2, noise, labels)


def equal(got, expected):
    assert torch.equal(got, expected)


def within(tolerance):
    """Of the largest magnitude."""

    def check(got, expected):
        got, expected = got.double(), expected.double()
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()

    return check


def almost_all_equal(got, expected):
    """Where two classes are as good as equal, rounding chooses."""
    assert got.shape == expected.shape
    assert (got.long() != expected.long()).sum() <= 1 + 2e-4 * got.numel()


def gradients(function, *leaves):
    """The result and the gradients of what is floating point."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


# A case yields (what to run, its check between levels, another function, the check against that).


def boundary_mask(generator):
    for dtype in INTEGERS:
        for distance in (1, 5, 130):  # the last needs wider counters
            size = (37, 131) if distance < 130 else (5, 9)
            labels = blobs(generator, 4, 2, *size).to(dtype)
            yield (
                lambda labels=labels, d=distance: ops.boundary_mask(labels, d),
                equal,
                lambda labels=labels, d=distance: boundary_mask_reference(labels, d),
                equal,
            )


def boundary_match(generator):
    for dtype, classes in [*((dtype, 5) for dtype in INTEGERS), (torch.int16, 300)]:
        size = (31, 77) if classes < 300 else (7, 19)
        maps = [blobs(generator, classes, 2, *size).to(dtype) for _ in range(2)]
        for radius in (1.5, 20):
            yield (
                lambda maps=maps, n=classes, r=radius: ops.boundary_match(*maps, n, r, -1).counts,
                equal,
                lambda maps=maps, n=classes, r=radius: boundary_match_reference(*maps, n, r, -1),
                equal,
            )


def confusion_matrix(generator):
    for dtype in INTEGERS:
        for classes in (3, 70, 127, 300, 1000):  # of one byte, of several tables, of two bytes
            if classes > torch.iinfo(dtype).max:
                continue
            maps = [blobs(generator, classes, 2, 31, 77).to(dtype) for _ in range(2)]
            yield (
                lambda maps=maps, n=classes: ops.confusion_matrix(*maps, n, -1),
                equal,
                lambda maps=maps, n=classes: confusion_reference(*maps, n, -1),
                equal,
            )


def upsample_argmax(generator):
    for dtype in FLOATS:
        for classes, size in ((19, (129, 250)), (5, (40, 31)), (300, (13, 70))):
            logits = torch.randn(2, classes, 17, 31, generator=generator).to(dtype)
            half = dtype in (torch.float16, torch.bfloat16)
            yield (
                lambda logits=logits, size=size: ops.upsample_argmax(logits, size),
                almost_all_equal,
                lambda logits=logits, size=size, half=half: upsample_argmax_reference(
                    logits.float() if half else logits, size
                ),
                None if half else almost_all_equal,  # of which many are equal
            )


def upsample_confusion(generator):
    for dtype in INTEGERS:
        for classes in (7, 127, 300):
            logits = torch.randn(2, classes, 9, 14, generator=generator)
            target = blobs(generator, min(classes, torch.iinfo(dtype).max), 2, 61, 97).to(dtype)

            def counts(logits=logits, target=target):
                return ops.upsample_confusion(logits, target, ignore_index=-1).matrix

            def of_labels(logits=logits, target=target, n=classes):
                labels = ops.upsample_argmax(logits, target.shape[1:])
                return confusion_reference(labels, target, n, -1)

            # Of the same labels the same counts; between levels labels may differ.
            yield counts, None, of_labels, equal


def panoptic_head(generator):
    logits = torch.randn(7, 23, 41, generator=generator)
    corners = torch.rand(9, 2, generator=generator) * torch.tensor([140.0, 80.0]) - 10
    boxes = torch.cat([corners, corners + 60 * torch.rand(9, 2, generator=generator)], 1)
    masks = torch.randn(9, 14, 14, generator=generator)
    labels = torch.randint(4, 7, (9,), generator=generator)
    arguments = logits, masks, boxes, labels

    def plain():
        full = interpolate(logits[None], (91, 163), mode="bilinear")[0]
        return ops.panoptic_logits(full, masks, boxes, labels, num_stuff=4).argmax(0)

    yield (
        lambda: ops.panoptic_head(*arguments, num_stuff=4, size=(91, 163)),
        equal,
        plain,
        almost_all_equal,
    )


def panoptic_merge(generator):
    size, stuff = (67, 203), range(3)
    corners = torch.rand(12, 2, generator=generator) * torch.tensor([180.0, 60.0]) - 10
    boxes = torch.cat([corners, corners + 70 * torch.rand(12, 2, generator=generator)], 1)
    cells = torch.rand(12, 28, 28, generator=generator)
    masks = paste(cells, boxes, size)
    scores, labels = torch.rand(12, generator=generator), torch.arange(12) % 4 + 3
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        semantic = blobs(generator, 5, 1, *size)[0].to(dtype)
        common = {"stuff_classes": stuff, "stuff_area": 20}

        def reference(semantic=semantic, common=common):
            return panoptic_merge_reference(masks, scores, labels, semantic, **common)[0]

        yield (
            lambda semantic=semantic, common=common: (
                ops.panoptic_merge(masks, scores, labels, semantic, **common).map
            ),
            equal,
            reference,
            equal,
        )
        yield (
            lambda semantic=semantic, common=common: (
                ops.panoptic_merge(cells, scores, labels, semantic, boxes=boxes, **common).map
            ),
            equal,
            reference,
            almost_all_equal,
        )


def panoptic_quality(generator):
    for scale in (1, 1000003):  # ids looked up in an array, and by hash
        maps = [blobs(generator, 8, 1, 67, 131)[0].int() * scale for _ in range(2)]
        maps[1] = torch.where(torch.rand(67, 131, generator=generator) < 0.3, maps[1], maps[0])
        found = [ids.unique(return_counts=True) for ids in maps]
        segments = [
            torch.stack([ids, ids // scale % 3, areas, torch.zeros_like(areas)], 1)[ids > 0]
            for ids, areas in found
        ]
        boundaries = [ops.boundary_mask(ids[None], 2)[0] for ids in maps]
        arguments = *maps, segments[0][:, :2], segments[1], 3

        def fractions(arguments=arguments):
            counts = ops.panoptic_quality(*arguments).counts.double()
            counts[:, 3] /= 2**FRACTION_BITS
            return counts

        yield (
            fractions,
            equal,
            lambda arguments=arguments: panoptic_quality_reference(*arguments),
            within(1e-9),
        )
        yield (
            lambda arguments=arguments, boundaries=boundaries: (
                ops.panoptic_quality(
                    *arguments,
                    prediction_boundary=boundaries[0],
                    target_boundary=boundaries[1],
                ).counts
            ),
            equal,
            None,
            None,
        )


def decode_png(generator):
    for mode, form in (("L", "values"), ("P", "values"), ("RGB", "colours")):
        for noise in (0, 3, 256):  # smooth, as a photograph, neither
            array = blobs(generator, 200, 1, 90, 171)[0].numpy().astype(np.uint8)
            if noise:
                array += (
                    torch.randint(0, noise, (90, 171), generator=generator).numpy().astype("u1")
                )
            stream = io.BytesIO()
            Image.fromarray(array).convert(mode).save(stream, "PNG")
            data = torch.from_numpy(np.frombuffer(bytearray(stream.getvalue()), np.uint8))
            yield (
                lambda data=data, form=form: ops.decode_png(data, form),
                equal,
                lambda data=data: decode_png_reference(data),
                equal,
            )
            if mode == "RGB":
                yield (lambda data=data: ops.decode_png(data, "segment_ids"), equal, None, None)


def deform_conv2d(generator):
    for dtype in FLOATS:
        for channels, outputs in ((32, 24), (21, 10)):
            tensors = [
                tensor.to(dtype)
                for tensor in (
                    torch.randn(2, channels, 13, 19, generator=generator),
                    torch.randn(2, 18, 13, 19, generator=generator),
                    torch.randn(outputs, channels, 3, 3, generator=generator) / 15,
                    torch.rand(2, 9, 13, 19, generator=generator),
                )
            ]
            # At whole numbers, to which float may round a position, the gradient of offsets jumps.
            near = (tensors[1].double() - tensors[1].double().round()).abs() < 1e-2
            tensors[1] = torch.where(near, torch.tensor(0.25, dtype=dtype), tensors[1])
            tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}.get(dtype, 3e-2)

            def run(function, x, o, w, m):
                return function(x, o, w, padding=1, mask=m)

            for index in range(5):
                yield (
                    lambda t=tensors, i=index, run=run: gradients(
                        lambda *leaves: run(ops.deform_conv2d, *leaves), *t
                    )[i],
                    within(tolerance),
                    lambda t=tensors, i=index, run=run: gradients(
                        lambda *leaves: run(torchvision.ops.deform_conv2d, *leaves),
                        *(tensor.double() for tensor in t),
                    )[i],
                    # The gradient of an offset is a difference of values that halves round.
                    within(tolerance) if tolerance < 1e-3 or index == 0 else None,
                )


def roi_align(generator):
    boxes = torch.rand(9, 4, generator=generator) * torch.tensor([50.0, 40.0, 20.0, 20.0])
    boxes[:, 2:] += boxes[:, :2] + 1
    boxes = torch.cat([torch.arange(9)[:, None] % 2, boxes], 1)
    for dtype in FLOATS:
        for channels in (64, 21):
            feature = torch.randn(2, channels, 30, 43, generator=generator).to(dtype)
            half = dtype in (torch.float16, torch.bfloat16)
            tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-2)
            regions = boxes.to(torch.float64 if dtype == torch.float64 else torch.float32)
            for name, arguments in (
                ("roi_align", (regions, 5, 0.5, 2)),
                ("roi_align", (regions, 7, 1.0, -1, True)),
                ("roi_pool", (regions, 7, 0.5)),
            ):
                peer = getattr(torchvision.ops, name)
                ours = getattr(ops, name)
                for index in range(2):
                    yield (
                        lambda f=feature, a=arguments, i=index, ours=ours: gradients(
                            lambda x: ours(x, *a), f
                        )[i],
                        equal if name == "roi_pool" else within(tolerance),
                        lambda f=feature, a=arguments, i=index, peer=peer, half=half: gradients(
                            lambda x: peer(x, *a), f.float() if half else f
                        )[i],
                        within(tolerance),
                    )
            yield (
                lambda f=feature, r=regions: gradients(
                    lambda x: ops.roi_align(x, r, 5, 0.5, 2, mode="max"), f
                )[0],
                within(tolerance),
                None,
                None,
            )


def dense_crf(generator):
    for classes, dtype in ((4, torch.float32), (11, torch.float32), (19, torch.float64)):
        unary = 2 * torch.randn(1, classes, 21, 35, generator=generator, dtype=dtype)
        coarse = torch.rand(1, 3, 4, 6, generator=generator)
        image = (255 * interpolate(coarse, (21, 35), mode="bilinear")).byte()

        def close(got, expected):  # a rounding may choose another, equally near vertex
            assert (got - expected).abs().mean() < 1e-5
            assert (got - expected).abs().max() < 1e-3

        def near(got, expected):  # the reference is exact
            assert (got - expected).abs().mean() < 1e-2

        yield lambda u=unary, image=image: ops.dense_crf(u, image, iterations=2), close, None, None
        yield (
            lambda u=unary, image=image: ops.dense_crf(u, image, iterations=2, quality="high"),
            close,
            lambda u=unary, image=image: dense_crf_reference(u, image, iterations=2),
            near,
        )
        for part in range(2):
            yield (
                lambda u=unary, image=image, part=part: gradients(
                    lambda u: ops.dense_crf(u, image, iterations=2), u
                )[part],
                close,
                None,
                None,
            )


CASES = [
    boundary_mask,
    boundary_match,
    confusion_matrix,
    decode_png,
    deform_conv2d,
    dense_crf,
    panoptic_head,
    panoptic_merge,
    panoptic_quality,
    roi_align,
    upsample_argmax,
    upsample_confusion,
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_level(generator, monkeypatch, case, level):
    monkeypatch.setenv("PYSEG_SIMD", level)
    if torch.ops.pyseg.simd_level() != level:
        pytest.skip(f"this processor does not run {level}")
    count = 0
    for run, check_levels, reference, check_reference in case(generator):
        monkeypatch.setenv("PYSEG_SIMD", level)
        got = run()
        if check_reference is not None:
            check_reference(got, reference())
        if check_levels is not None:
            monkeypatch.setenv("PYSEG_SIMD", "generic")
            check_levels(got, run())
        count += 1
    assert count > 0


def test_every_op_has_a_case():
    names = {case.__name__ for case in CASES}
    kernels = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pyseg::")
    }
    hidden = {name for name in kernels if name.startswith("_")}
    assert kernels - hidden - {"simd_level"} == names


# Calls that are shared out among threads.
LARGE = {
    "confusion_matrix": [
        lambda: ops.confusion_matrix(*[torch.zeros(2, 600, 700, dtype=torch.uint8)] * 2, 3)
    ],
    "panoptic_merge": [
        lambda: ops.panoptic_merge(
            torch.ones(9, 28, 28),
            torch.ones(9),
            torch.ones(9, dtype=torch.int64),
            torch.zeros(600, 700, dtype=torch.uint8),
            stuff_classes=[0],
            boxes=torch.tensor([[0.0, 0, 700, 600]]).repeat(9, 1),
        )
    ],
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_unknown_level_is_refused_before_threads_start(generator, monkeypatch, case):
    """What a thread throws comes out as another error, without its text."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [next(case(generator))[0], *LARGE.get(case.__name__, [])]
        monkeypatch.setenv("PYSEG_SIMD", "v5")
        for run in runs:
            with pytest.raises(ValueError, match="PYSEG_SIMD must be v4, v3 or generic, got v5"):
                run()
    finally:
        torch.set_num_threads(before)
