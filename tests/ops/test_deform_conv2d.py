"""deform_conv2d against torchvision's, against grid_sample, and against conv2d."""

import math
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import DeformConv2d as TorchvisionDeformConv2d
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

from pyseg.ops import DeformConv2d, deform_conv2d
from pyseg.ops.deform_conv2d import FLOATS, reference

NAMES = ("input", "offset", "weight", "bias", "mask")


def make_case(
    generator,
    images=2,
    channels=6,
    size=(9, 7),
    outputs=4,
    kernel=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    groups=1,
    offset_groups=1,
    scale=2.0,
    bias=True,
    mask=True,
    dtype=torch.float32,
):
    """The tensors of a problem, and its geometry."""
    taps = math.prod(kernel)
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # At whole numbers, to which float may round a position, the gradient of the offset jumps.
    offset = scale * randn(images, 2 * offset_groups * taps, *out)
    if scale:
        offset = torch.where((offset - offset.round()).abs() < 1e-3, offset + 2e-3, offset)
    tensors = {
        "input": randn(images, channels, *size),
        "offset": offset,
        "weight": randn(outputs, channels // groups, *kernel),
        "bias": randn(outputs) if bias else None,
        "mask": randn(images, offset_groups * taps, *out) if mask else None,
    }
    return SimpleNamespace(
        tensors=tensors,
        geometry={"stride": stride, "padding": padding, "dilation": dilation},
        args=[*tensors.values(), list(stride), list(padding), list(dilation)],
    )


def copy_of(case, dtype):
    tensors = {name: t if t is None else t.to(dtype) for name, t in case.tensors.items()}
    return SimpleNamespace(tensors=tensors, geometry=case.geometry)


def with_gradients(function, case, grad=None):
    """The output and the gradients of all tensors that are there."""
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in case.tensors.items()
        if tensor is not None
    }
    output = function(**leaves, **case.geometry)
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_close(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].shape == expected[name].shape and got[name].dtype == expected[name].dtype
        difference = (got[name] - expected[name]).abs().max() if got[name].numel() else 0
        scale = expected[name].abs().max() if got[name].numel() else 1
        assert difference <= tolerance * scale, f"{name}: {difference / scale}"


CASES = {
    "plain": {},
    "v1": dict(mask=False, bias=False),
    "odd": dict(size=(23, 31), channels=19, outputs=13),
    "several blocks": dict(channels=70, outputs=33, size=(12, 11)),
    "groups": dict(channels=12, outputs=6, groups=3),
    "offset groups": dict(channels=12, offset_groups=4, size=(13, 10)),
    "both groups": dict(channels=12, outputs=4, groups=2, offset_groups=3),
    "depthwise": dict(channels=20, outputs=20, groups=20, offset_groups=20),
    "groups and wide": dict(channels=96, outputs=34, groups=2, offset_groups=2, images=1),
    "wide": dict(channels=68, outputs=140, kernel=(1, 2), padding=(0, 1)),
    "asymmetric": dict(kernel=(2, 5), stride=(2, 1), padding=(0, 3), dilation=(3, 2)),
    "large kernel": dict(kernel=(7, 7), padding=(3, 3), channels=18, size=(8, 9)),
    "stride": dict(stride=(3, 2), size=(20, 19)),
    "one pixel": dict(size=(1, 1), images=3),
    "1x1": dict(kernel=(1, 1), padding=(0, 0), channels=300, outputs=5),
    "1x1 on a row": dict(kernel=(1, 1), padding=(0, 0), size=(1, 200), outputs=1),
    "far": dict(scale=30.0, channels=17),
    "many images": dict(images=21, channels=3, size=(4, 5)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_against_torchvision(generator, case, dtype, tolerance):
    case = make_case(generator, **CASES[case], dtype=dtype)
    got = with_gradients(deform_conv2d, case)
    assert_close(got, with_gradients(torchvision_deform_conv2d, case), tolerance)


SMALL = ["plain", "v1", "wide", "both groups", "groups and wide", "asymmetric", "1x1", "far"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_kernel_against_torchvision(device, generator, name, dtype):
    case = make_case(generator, **CASES[name], dtype=dtype)
    wide = copy_of(case, torch.float64)
    expected = with_gradients(torchvision_deform_conv2d, wide)
    grad = torch.randn(expected["output"].shape, generator=torch.Generator().manual_seed(7))
    args = [arg.to(device.name) if isinstance(arg, torch.Tensor) else arg for arg in case.args]
    output = device.ops.deform_conv2d(*args)
    args = [grad.double().to(output), *args[:3], *args[4:]]
    *gradients, mask = device.ops._deform_conv2d_backward(*args)
    got = dict(zip(("input", "offset", "weight", "bias"), gradients, strict=True))
    got |= {"output": output, "mask": mask}
    # In half precision the gradients of the columns are rounded, too.
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}.get(dtype, 1e-10)
    assert all(got[name].dtype == dtype for name in got)
    got = {name: got[name].cpu().double() for name in expected}
    assert_close(got, expected, tolerance)


def test_small_kernel_of_an_empty_batch(device):
    tensors = [
        torch.zeros(shape, device=device.name)
        for shape in ((0, 6, 5, 5), (0, 18, 3, 3), (4, 6, 3, 3))
    ]
    geometry = ([1, 1], [0, 0], [1, 1])
    output = device.ops.deform_conv2d(*tensors, None, None, *geometry)
    assert output.shape == (0, 4, 3, 3)
    gradients = device.ops._deform_conv2d_backward(output, *tensors, None, *geometry)
    assert [g.shape for g in gradients[:4]] == [*(t.shape for t in tensors), (4,)]
    assert not gradients[2].any() and not gradients[3].any()


def test_small_kernel_gradients_of_no_outputs(device):
    tensors = [
        torch.ones(shape, device=device.name)
        for shape in ((2, 6, 5, 5), (2, 18, 0, 3), (4, 6, 3, 3))
    ]
    grad = torch.zeros(2, 4, 0, 3, device=device.name)
    gradients = device.ops._deform_conv2d_backward(grad, *tensors, None, [1, 1], [0, 0], [1, 1])
    assert not any(g.any() for g in gradients[:4])


@pytest.mark.parametrize("dtype, other", [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_small_kernel_gradients_under_autocast(device, generator, dtype, other):
    """A layer outside of autocast whose gradient is asked for inside of it."""
    case = make_case(generator, channels=8, groups=2, dtype=getattr(torch, dtype))
    args = [arg.to(device.name) if isinstance(arg, torch.Tensor) else arg for arg in case.args]
    output = device.ops.deform_conv2d(*args)
    args = [torch.ones_like(output), *args[:3], *args[4:]]
    expected = device.ops._deform_conv2d_backward(*args)
    with torch.autocast(device.name, dtype=getattr(torch, other)):
        got = device.ops._deform_conv2d_backward(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_small_kernel_with_channels_that_are_loaded_alone_or_together(device, generator):
    """Four and eight channels at once where all groups allow it, else one; the same result."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        case = make_case(generator, channels=96, outputs=24, size=(6, 7), dtype=dtype)
        padded = dict(case.tensors)
        padded["input"] = torch.cat([padded["input"], torch.ones(2, 1, 6, 7, dtype=dtype)], 1)
        padded["weight"] = torch.cat([padded["weight"], torch.zeros(24, 1, 3, 3, dtype=dtype)], 1)
        outputs = [
            device.ops.deform_conv2d(
                *(t.to(device.name) for t in tensors.values()), [1, 1], [1, 1], [1, 1]
            )
            for tensors in (case.tensors, padded)
        ]
        difference = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
        assert difference <= tolerance


@pytest.mark.long  # minutes when emulated, where test_large_shapes_can_be_launched sees the same
def test_kernel_gradients_of_two_million_pixels(device):
    """As rows of the transposed input they once exceeded a grid's second dimension."""
    height, width = 1024, 2049
    input = torch.zeros(1, 1, height, width, device=device.name)
    offset = torch.zeros(1, 2, 1, 1, device=device.name)
    weight = torch.full((1, 1, 1, 1), 3.0, device=device.name)
    grad = torch.ones(1, 1, 1, 1, device=device.name)
    offset[0, :, 0, 0] = torch.tensor([height - 1.0, width - 1.0])
    gradients = device.ops._deform_conv2d_backward(
        grad, input, offset, weight, None, [1, 1], [0, 0], [1, 1]
    )
    assert gradients[0].sum() == 3 and gradients[0][0, 0, -1, -1] == 3


def test_kernel_refuses_gradients_of_more_numbers_than_it_can_sort(device):
    size = 1 << 13
    tensors = [
        torch.zeros(1, device=device.name).expand(shape)
        for shape in ((1, 1, size, size), (1, 18, size, size), (1, 1, 3, 3))
    ]
    grad = tensors[0].expand(1, 1, size, size)
    with pytest.raises(ValueError, match="split the image"):
        device.ops._deform_conv2d_backward(grad, *tensors, None, [1, 1], [1, 1], [1, 1])


@pytest.mark.parametrize("case", CASES)
def test_against_grid_sample(generator, case):
    case = make_case(generator, **CASES[case], dtype=torch.float64)
    assert_close(with_gradients(deform_conv2d, case), with_gradients(reference, case), 1e-10)


def test_random_problems_against_torchvision(generator):
    def draw(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    for _ in range(40):
        groups, offset_groups = draw(1, 2, 3), draw(1, 2, 3, 4)
        options = dict(
            images=draw(1, 2, 3),
            channels=math.lcm(groups, offset_groups) * draw(1, 2, 5, 11),
            outputs=groups * draw(1, 3, 8, 17),
            size=(draw(3, 8, 17, 40), draw(3, 5, 16, 33)),
            kernel=(draw(1, 2, 3), draw(1, 3, 4)),
            stride=(draw(1, 2), draw(1, 3)),
            padding=(draw(2, 3), draw(2, 4)),
            dilation=(draw(1, 2), draw(1, 2)),
            scale=draw(0.1, 1.0, 5.0, 50.0),
            bias=draw(False, True),
            mask=draw(False, True),
            groups=groups,
            offset_groups=offset_groups,
        )
        print(options)  # shown where the test fails
        case = make_case(generator, **options, dtype=torch.float64)
        expected = with_gradients(torchvision_deform_conv2d, case)
        assert_close(with_gradients(deform_conv2d, case), expected, 1e-10)


# The parameters of torchvision's own test. Differences: torchvision also tests torch.jit.script,
# which this function does not support; its errors are RuntimeError; autocast gives it float32.
TORCHVISION = dict(
    channels=6,
    outputs=2,
    groups=2,
    offset_groups=3,
    stride=(2, 1),
    padding=(1, 0),
    dilation=(2, 1),
    kernel=(3, 2),
    size=(5, 4),
)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("images", [0, 33])
@pytest.mark.parametrize("mask", [True, False])
def test_parameters_of_torchvisions_test(generator, images, contiguous, mask):
    case = make_case(
        generator, **TORCHVISION, images=images, mask=mask, scale=1.0, dtype=torch.float64
    )
    if not contiguous:
        for name, order in (
            ("input", (0, 1, 3, 2)),
            ("offset", (1, 3, 0, 2)),
            ("mask", (3, 2, 0, 1)),
            ("weight", (3, 2, 0, 1)),
        ):
            if case.tensors[name] is not None:
                back = [order.index(i) for i in range(4)]
                permuted = case.tensors[name].permute(order).contiguous().permute(back)
                case.tensors[name] = permuted
        assert not case.tensors["weight"].is_contiguous()
    layer = DeformConv2d(
        6, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2
    ).double()
    with torch.no_grad():
        layer.weight.copy_(case.tensors["weight"]), layer.bias.copy_(case.tensors["bias"])
    got = layer(case.tensors["input"], case.tensors["offset"], case.tensors["mask"])
    expected = torchvision_deform_conv2d(**case.tensors, **case.geometry)
    assert_close({"output": got}, {"output": expected}, 1e-10)

    names = [name for name in NAMES if case.tensors[name] is not None]
    leaves = [case.tensors[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(
        lambda *leaves: deform_conv2d(**dict(zip(names, leaves, strict=True)), **case.geometry),
        leaves,
        fast_mode=True,
    )


def test_gradcheck_of_every_input(generator):
    options = dict(channels=4, outputs=2, groups=2, offset_groups=2, size=(4, 3), images=1)
    case = make_case(generator, **options, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]
    torch.autograd.gradcheck(
        lambda *leaves: deform_conv2d(**dict(zip(NAMES, leaves, strict=True)), **case.geometry),
        leaves,
    )


def test_a_second_derivative_raises(generator):
    case = make_case(generator, dtype=torch.float64)
    input = case.tensors["input"].requires_grad_()
    output = deform_conv2d(**case.tensors, **case.geometry)
    (gradient,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_offsets_are_a_convolution(generator, dtype):
    options = dict(channels=40, outputs=24, groups=2, stride=(2, 1), size=(17, 22), scale=0.0)
    case = make_case(generator, **options, mask=False, dtype=dtype)
    tensors = {name: case.tensors[name] for name in ("input", "weight", "bias")}
    expected = torch.conv2d(
        **{name: tensor.double() for name, tensor in tensors.items()}, **case.geometry, groups=2
    )
    got = deform_conv2d(**case.tensors, **case.geometry)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}.get(dtype, 1e-12)
    assert_close({"output": got.double()}, {"output": expected}, tolerance)


@pytest.mark.parametrize("case", ["plain", "several blocks", "groups and wide", "1x1 on a row"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_within_rounding(generator, case, dtype):
    case = make_case(generator, **CASES[case], scale=1.0, dtype=dtype)
    wide = copy_of(case, torch.float64)
    grad = torch.randn(reference(**wide.tensors, **case.geometry).shape, generator=generator)
    grad = grad.to(dtype)
    got = with_gradients(deform_conv2d, case, grad)
    expected = with_gradients(torchvision_deform_conv2d, wide, grad.double())
    # Each number that enters a sum, and then the sum, may be off by one rounding.
    magnitudes = {name: t if t is None else t.abs() for name, t in wide.tensors.items()}
    magnitudes["offset"] = wide.tensors["offset"]
    bound = torch.finfo(dtype).eps * reference(**magnitudes, **case.geometry)
    assert ((got.pop("output").double() - expected.pop("output")).abs() <= bound).all()
    for name, gradient in got.items():
        assert gradient.dtype == dtype
        scale = expected[name].abs()
        error = (gradient.double() - expected[name]).abs()
        tolerance = torch.finfo(dtype).eps * scale + 1e-5 * scale.max()
        assert (error <= tolerance).all(), name


def test_any_strides(generator):
    case = make_case(generator, channels=20, size=(8, 9))
    expected = deform_conv2d(**case.tensors, **case.geometry)
    for change in (
        lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.flip(0).contiguous().flip(0),
    ):
        tensors = {name: change(tensor) for name, tensor in case.tensors.items()}
        assert torch.equal(deform_conv2d(**tensors, **case.geometry), expected)


def test_positions_outside_the_image(generator):
    """Zeros are read there, also by offsets that no integer holds."""
    case = make_case(generator, size=(5, 6))
    bias = case.tensors["bias"][:, None, None].expand(4, 5, 6)
    for far in (100.0, -100.0, 3e9, -1e30, math.inf, -math.inf):
        case.tensors["offset"] = torch.full((2, 18, 5, 6), far)
        got = with_gradients(deform_conv2d, case)
        assert torch.equal(got["output"], bias.expand(2, 4, 5, 6)), far
        for name in ("input", "offset", "weight", "mask"):
            assert not got[name].any(), (far, name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_stays_in_its_pixel(generator, dtype):
    case = make_case(generator, size=(5, 6), channels=33, dtype=dtype)
    expected = with_gradients(deform_conv2d, case)
    case.tensors["offset"][1, 4, 2, 3] = math.nan  # of tap 2
    got = with_gradients(deform_conv2d, case)
    touched = torch.zeros(2, 5, 6, dtype=torch.bool)
    touched[1, 2, 3] = True
    assert got["output"].isnan().any(1).equal(touched)
    assert got["output"].isnan().all(1).equal(touched)
    output = expected["output"].movedim(1, -1)
    assert torch.equal(got["output"].movedim(1, -1)[~touched], output[~touched])
    assert got["mask"].isnan().nonzero().tolist() == [[1, 2, 2, 3]]
    assert got["input"].isfinite().all()
    assert got["weight"].isnan()[:, :, 0, 2].all() and got["weight"].isnan().sum() == 4 * 33


def test_infinite_and_nan_input_stay_where_they_are_sampled(generator):
    case = make_case(generator, size=(9, 7), channels=21, scale=0.3, mask=False)
    case.tensors["input"][0, 20, 4, 4] = math.inf
    case.tensors["input"][1, 3, 0, 0] = math.nan
    got = deform_conv2d(**case.tensors, **case.geometry)
    expected = torchvision_deform_conv2d(**case.tensors, **case.geometry)
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert got.isfinite().any() and not got.isfinite().all()
    # The gradient of the input is finite: no value of a neighbour leaks into it.
    gradients = with_gradients(deform_conv2d, case)
    assert gradients["input"].isfinite().all()


def test_images_in_several_portions(generator):
    """Memory for the input's other layout is bounded; this takes three portions of it."""
    options = dict(images=3, channels=16, outputs=2, kernel=(1, 1), padding=(0, 0), mask=False)
    case = make_case(generator, **options, size=(800, 700), stride=(9, 9))
    expected = torchvision_deform_conv2d(**case.tensors, **case.geometry)
    got = deform_conv2d(**case.tensors, **case.geometry)
    assert_close({"output": got}, {"output": expected}, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(generator, dtype):
    case = make_case(generator, images=3, channels=70, outputs=20, size=(21, 22), dtype=dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(deform_conv2d, case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


BAD = [
    (dict(input=torch.zeros(3, 5, 5)), r"input must have 4 dimensions, got 3: \[3, 5, 5\]"),
    (dict(input=torch.zeros(1, 4, 5, 5).long()), "input must be floating.*int64; use input.float"),
    (dict(input=torch.zeros(1, 0, 5, 5)), r"input must have channels.*\[1, 0, 5, 5\]"),
    (dict(input=torch.zeros(1, 5, 5, 5)), "weight takes 4 channels per group.*the 5 of input"),
    (dict(input=torch.zeros(1, 12, 5, 5)), "weight has 2 outputs, which its 3 groups.*divide"),
    (dict(input=torch.zeros(1, 4, 2, 5)), "input of 2 x 5 pixels is smaller.*would be 0 x 3"),
    (dict(input=torch.zeros(2, 4, 5, 5)), r"offset must be \[2, 18, 3, 3\], got \[1, 18, 3, 3\]"),
    (dict(input=torch.zeros(1, 4, 5, 5, device="meta")), "offset is on cpu, but input on meta"),
    (dict(weight=torch.zeros(2, 4, 3)), "weight must have 4 dimensions, got 3"),
    (dict(weight=torch.zeros(0, 4, 3, 3)), "weight must not be empty"),
    (dict(weight=torch.zeros(2, 4, 3, 3).double()), r"weight is torch.float64.*weight.to\(input"),
    (dict(offset=torch.zeros(1, 18, 3)), "offset must have 4 dimensions, got 3"),
    (dict(offset=torch.zeros(1, 19, 3, 3)), "offset must have a multiple of .* = 18 channels.*19"),
    (dict(offset=torch.zeros(1, 0, 3, 3)), "offset must have a multiple of .* = 18 channels"),
    (dict(offset=torch.zeros(1, 54, 3, 3)), "offset has 3 offset groups, which do not divide.*4"),
    (dict(offset=torch.zeros(1, 18, 3, 4)), r"offset must be \[1, 18, 3, 3\], got \[1, 18, 3, 4"),
    (dict(mask=torch.zeros(1, 18, 3, 3)), r"mask must be \[1, 9, 3, 3\], got \[1, 18, 3, 3\]"),
    (dict(mask=torch.zeros(1, 9, 3, 3).half()), "mask is torch.float16, but input torch.float32"),
    (dict(bias=torch.zeros(3)), r"bias must be \[2\], got \[3\]"),
    (dict(bias=torch.zeros(1, 2)), "bias must have 1 dimensions, got 2"),
    (dict(stride=0), "stride must be one or two integers of at least 1, got 0"),
    (dict(stride=(1, 1, 1)), "stride must be one or two integers"),
    (dict(padding=-1), "padding must be one or two integers of at least 0, got -1"),
    (dict(dilation=1.5), "dilation must be one or two integers"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_bad_arguments(change, message):
    good = dict(
        input=torch.zeros(1, 4, 5, 5),
        offset=torch.zeros(1, 18, 3, 3),
        weight=torch.zeros(2, 4, 3, 3),
        bias=torch.zeros(2),
        mask=torch.zeros(1, 9, 3, 3),
    )
    assert deform_conv2d(**good).shape == (1, 2, 3, 3)
    with pytest.raises(ValueError, match=message):
        deform_conv2d(**{**good, **change})


def test_the_operator_itself_checks_shapes(generator):
    for position, tensor in ((0, torch.zeros(2, 5, 9, 7)), (1, torch.zeros(1, 18, 9, 7))):
        args = make_case(generator).args
        args[position] = tensor
        with pytest.raises(ValueError, match="does not fit"):
            torch.ops.pyseg.deform_conv2d(*args)


@pytest.mark.parametrize("case", ["plain", "v1", "both groups"])
def test_opcheck(generator, case):
    case = make_case(generator, **CASES[case])
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in case.args]
    torch.library.opcheck(torch.ops.pyseg.deform_conv2d.default, leaves)
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.args]
    grad = torch.ops.pyseg.deform_conv2d(*args)
    del args[3]  # the bias
    torch.library.opcheck(torch.ops.pyseg._deform_conv2d_backward.default, [grad, *args])


def test_compile_and_export(compiler, generator):
    layer = DeformConv2d(6, 4, 3, padding=1, offset_conv="v2", offset_groups=2)
    torch.nn.init.normal_(layer.conv_offset.weight)
    input = torch.randn(2, 6, 9, 8, generator=generator)
    expected = layer(input)
    expected.square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    compiled = compiler(layer)
    got = compiled(input)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, gradient, rtol=1e-3, atol=1e-3)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w")}
    exported = torch.export.export(layer, (input,), dynamic_shapes=(dims,)).module()
    other = torch.randn(3, 6, 5, 12, generator=generator)
    torch.testing.assert_close(exported(other), layer(other), rtol=1e-4, atol=1e-4)


def test_autocast_as_conv2d(generator):
    case = make_case(generator, channels=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(deform_conv2d, case)
    assert got["output"].dtype == torch.bfloat16
    assert all(got[name].dtype == torch.float32 for name in NAMES)
    rounded = {name: tensor.bfloat16() for name, tensor in case.tensors.items()}
    assert torch.equal(got["output"], deform_conv2d(**rounded, **case.geometry))
    wide = {name: tensor.double() for name, tensor in case.tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert deform_conv2d(**wide, **case.geometry).dtype == torch.float64


def test_layer_loads_torchvisions_state(generator):
    options = dict(stride=2, padding=1, dilation=2, groups=2)
    theirs, ours = TorchvisionDeformConv2d(6, 4, 3, **options), DeformConv2d(6, 4, 3, **options)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert theirs.load_state_dict(ours.state_dict())
    input, offset = torch.rand(1, 6, 9, 9), torch.randn(1, 18, 4, 4, generator=generator)
    torch.testing.assert_close(ours(input, offset), theirs(input, offset))


@pytest.mark.parametrize(
    "version, name", [("v1", "conv_offset"), ("v2", "conv_offset"), ("v2", "conv_offset_mask")]
)
def test_layer_loads_the_state_of_a_pack(generator, version, name):
    """As mmcv defines its packs: o1, o2, mask = conv_offset(x).chunk(3, 1)."""
    per_tap = 3 if version == "v2" else 2
    offset_conv = torch.nn.Conv2d(6, 2 * per_tap * 9, 3, padding=1)
    weight = torch.randn(4, 6, 3, 3, generator=generator)
    state = {"0.weight": weight}
    for part, value in offset_conv.state_dict().items():
        state[f"0.{name}.{part}"] = value
    layer = DeformConv2d(6, 4, 3, padding=1, bias=False, offset_conv=version, offset_groups=2)
    model = torch.nn.Sequential(layer)
    input = torch.randn(1, 6, 8, 7, generator=generator)
    half = 0.5 if version == "v2" else 1.0  # the sigmoid of zero
    plain = half * torch.conv2d(input, layer.weight, padding=1)
    torch.testing.assert_close(layer(input), plain)
    model.load_state_dict(state)
    predicted = offset_conv(input)
    offset, mask = predicted, None
    if version == "v2":
        first, second, mask = predicted.chunk(3, 1)
        offset, mask = torch.cat([first, second], 1), mask.sigmoid()
    expected = torchvision_deform_conv2d(input, offset, weight, padding=1, mask=mask)
    torch.testing.assert_close(model(input), expected)


def test_layer_arguments():
    with pytest.raises(ValueError, match="in_channels must be divisible by groups, got 5 and 2"):
        DeformConv2d(5, 4, 3, groups=2)
    with pytest.raises(ValueError, match='offset_conv must be None, "v1" or "v2", got True'):
        DeformConv2d(4, 4, 3, offset_conv=True)
    with pytest.raises(ValueError, match="divisible by offset_groups"):
        DeformConv2d(4, 4, 3, offset_conv="v1", offset_groups=3)
    with pytest.raises(ValueError, match="offset is missing"):
        DeformConv2d(4, 4, 3)(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match="takes no offset"):
        DeformConv2d(4, 4, 3, offset_conv="v1")(torch.zeros(1, 4, 5, 5), torch.zeros(1, 18, 3, 3))
