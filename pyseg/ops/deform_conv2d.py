"""Deformable convolution, versions 1 and 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _native

_native.load()

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolution whose taps read the input at positions of their own, bilinearly.

    Version 1 without ``mask`` (Dai et al., "Deformable Convolutional Networks", 2017), version 2
    with it (Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", 2019). Arguments
    and results are those of ``torchvision.ops.deform_conv2d``. Tap (i, j) at output pixel (y, x)
    reads

        y * stride - padding + i * dilation + offset_y,    the same for x

    and outside the image there are zeros. Sums are float32 (float64 for float64). Where the
    hardware multiplies half precision (bfloat16 on CPUs with AVX512-BF16, both types on tensor
    cores), sampled values are rounded to the input's dtype before they meet the weights. An
    infinite offset is outside the image; one that is NaN makes its output pixel NaN, and the
    gradients that pass through it.

    Differentiable once, in all five tensors. Nothing depends on the order of threads: on the CPU
    the gradients have the same bits whatever their number. Under autocast everything but float64 is
    cast to the autocast dtype, as for ``conv2d``.

    Args:
        input: [N, C, H, W], float16, bfloat16, float32 or float64. The other tensors have its dtype
            and device. Any strides.
        offset: [N, 2 * offset_groups * kh * kw, Ho, Wo] in pixels of the input, ordered
            (offset group, tap, (y, x)). Each offset group moves C / offset_groups channels.
        weight: [O, C / groups, kh, kw].
        bias: [O].
        stride, padding, dilation: one integer, or two as (vertical, horizontal).
        mask: [N, offset_groups * kh * kw, Ho, Wo], what the sampled values are multiplied with.

    Returns:
        [N, O, Ho, Wo], where Ho = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1.

    Raises:
        ValueError: a tensor has the wrong rank, size, dtype or device; groups do not divide the
            channels; stride, padding or dilation are not one or two integers of the right sign.
        RuntimeError: in a second derivative.

    Example:
        >>> input, weight = torch.rand(1, 3, 8, 8), torch.rand(5, 3, 3, 3)
        >>> offset = torch.zeros(1, 2 * 3 * 3, 6, 6)  # zeros: an ordinary convolution
        >>> torch.allclose(
        ...     deform_conv2d(input, offset, weight), torch.conv2d(input, weight), atol=1e-5
        ... )
        True
    """
    named: dict[str, Any] = {
        "input": input,
        "offset": offset,
        "weight": weight,
        "bias": bias,
        "mask": mask,
    }
    tensors = {
        name: tensor
        for name, tensor in named.items()
        if tensor is not None or name not in ("bias", "mask")
    }
    _native.check_tensors(**tensors)
    device = input.device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but input on {device}: move one")
    if _native.autocast(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        tensors = {
            name: tensor.to(dtype) if tensor.dtype in FLOATS[:3] else tensor
            for name, tensor in tensors.items()
        }
    pairs = [
        _pair("stride", stride, 1),
        _pair("padding", padding, 0),
        _pair("dilation", dilation, 1),
    ]
    _check(tensors, *pairs)
    _native.require("deform_conv2d", input)
    return torch.ops.pyseg.deform_conv2d(
        tensors["input"],
        tensors["offset"],
        tensors["weight"],
        tensors.get("bias"),
        tensors.get("mask"),
        *pairs,
    )


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    wrong = f"{name} must be one or two integers of at least {least}, got {value}"
    given = value if isinstance(value, Sequence) else (value, value)
    try:
        pair = tuple(_native.integer(name, part) for part in given)
    except ValueError:
        raise ValueError(wrong) from None
    if len(pair) != 2 or not all(least <= part < 2**31 for part in pair):
        raise ValueError(wrong)
    return pair[0], pair[1]


def _check(
    tensors: dict[str, Tensor],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    input, offset, weight = tensors["input"], tensors["offset"], tensors["weight"]
    if input.dtype not in FLOATS:
        raise ValueError(f"input must be floating point, got {input.dtype}; use input.float()")
    for name, tensor in tensors.items():
        if tensor.dtype != input.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, but input {input.dtype}; use {name}.to(input.dtype)"
            )
        rank = 1 if name == "bias" else 4
        if tensor.ndim != rank:
            raise ValueError(
                f"{name} must have {rank} dimensions, got {tensor.ndim}: {list(tensor.shape)}"
            )
    images, channels, *size = input.shape
    outputs, group_channels, *kernel = weight.shape
    if 0 in input.shape[1:]:
        raise ValueError(f"input must have channels and pixels, got {list(input.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight must not be empty, got {list(weight.shape)}")
    if channels % group_channels:
        raise ValueError(
            f"weight takes {group_channels} channels per group, which do not divide the {channels} "
            "of input"
        )
    groups = channels // group_channels
    if outputs % groups:
        raise ValueError(
            f"weight has {outputs} outputs, which its {groups} groups ({channels} channels of "
            f"input / {group_channels}) do not divide"
        )
    taps = kernel[0] * kernel[1]
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups == 0 or offset.shape[1] % (2 * taps):
        raise ValueError(
            f"offset must have a multiple of 2 * kh * kw = {2 * taps} channels for weight "
            f"{list(weight.shape)}, got {list(offset.shape)}"
        )
    if channels % offset_groups:
        raise ValueError(
            f"offset has {offset_groups} offset groups, which do not divide the {channels} "
            "channels of input"
        )
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    if min(out) < 1:
        raise ValueError(
            f"input of {size[0]} x {size[1]} pixels is smaller than the kernel: the output would "
            f"be {out[0]} x {out[1]}; use padding"
        )
    expected = {
        "offset": [images, offset.shape[1], *out],
        "mask": [images, offset_groups * taps, *out],
        "bias": [outputs],
    }
    for name, shape in expected.items():
        if name in tensors and list(tensors[name].shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(tensors[name].shape)}")


@torch.library.register_fake("pyseg::deform_conv2d")
def _(input, offset, weight, bias, mask, stride, padding, dilation):
    return input.new_empty((input.shape[0], weight.shape[0], *offset.shape[2:]))


@torch.library.register_fake("pyseg::_deform_conv2d_backward")
def _(grad, input, offset, weight, mask, stride, padding, dilation):
    return (
        input.new_empty(input.shape),
        input.new_empty(offset.shape),
        input.new_empty(weight.shape),
        input.new_empty(weight.shape[:1]),
        input.new_empty((0,) if mask is None else mask.shape),
    )


def _setup_context(ctx, inputs, output):
    input, offset, weight, bias, mask, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.has_bias = bias is not None


def _backward(ctx, grad):
    input, offset, weight, mask = ctx.saved_tensors
    *grads, grad_bias, grad_mask = torch.ops.pyseg._deform_conv2d_backward(
        grad, input, offset, weight, mask, *ctx.geometry
    )
    return (
        *grads,
        grad_bias if ctx.has_bias else None,
        None if mask is None else grad_mask,
        *(None, None, None),
    )


def _twice(ctx, *grads):
    raise RuntimeError("deform_conv2d is differentiable once; its gradients have no gradient")


torch.library.register_autograd("pyseg::deform_conv2d", _backward, setup_context=_setup_context)
torch.library.register_autograd("pyseg::_deform_conv2d_backward", _twice)


class DeformConv2d(nn.Module):
    """A layer of `deform_conv2d`, with the parameters of ``torchvision.ops.DeformConv2d``.

    With ``offset_conv`` the layer predicts its own offsets by a convolution ``conv_offset`` that
    begins with zeros, so that it begins as an ordinary convolution: "v1" is mmcv's
    ``DeformConv2dPack`` (give it ``bias=False``), "v2" its ``ModulatedDeformConv2dPack``, whose
    mask is the sigmoid of the last third of the channels.

    State dicts of torchvision's layer, of mmcv's ``DeformConv2d`` and ``ModulatedDeformConv2d``,
    and with ``offset_conv`` those of mmcv's two packs have the same names and load as they are;
    packs that call the convolution ``conv_offset_mask`` (DCNv2's first releases) load too.

    Args:
        in_channels, out_channels: C and O.
        kernel_size, stride, padding, dilation: one integer, or (vertical, horizontal).
        groups: divides both numbers of channels.
        bias: whether there is one.
        offset_conv: None (offsets are an argument of the call), "v1" or "v2".
        offset_groups: with ``offset_conv``, into how many groups the channels are divided that move
            together (mmcv's ``deform_groups``).

    Raises:
        ValueError: groups do not divide the channels, or another argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_conv: str | None = None,
        offset_groups: int = 1,
    ):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or value % groups:
                raise ValueError(f"{name} must be divisible by groups, got {value} and {groups}")
        if offset_conv not in (None, "v1", "v2"):
            raise ValueError(f'offset_conv must be None, "v1" or "v2", got {offset_conv!r}')
        if offset_groups < 1 or in_channels % offset_groups:
            raise ValueError(
                f"in_channels must be divisible by offset_groups, got {in_channels} and "
                f"{offset_groups}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        self.dilation = _pair("dilation", dilation, 1)
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.offset_conv = offset_conv
        if offset_conv is not None:
            per_tap = 3 if offset_conv == "v2" else 2
            self.conv_offset = nn.Conv2d(
                in_channels,
                offset_groups * per_tap * math.prod(self.kernel_size),
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as ``torch.nn.Conv2d`` begins with; no offsets."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        if self.offset_conv is not None:
            for parameter in self.conv_offset.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Returns [N, O, Ho, Wo].

        Args:
            input: [N, C, H, W].
            offset, mask: as in `deform_conv2d`; neither with ``offset_conv``, which makes them.
        """
        if (offset is None) != (self.offset_conv is not None) or (
            self.offset_conv is not None and mask is not None
        ):
            raise ValueError(
                "offset is missing: pass it, or make the layer with offset_conv"
                if self.offset_conv is None
                else f"the layer has offset_conv={self.offset_conv!r} and takes no offset and mask"
            )
        if self.offset_conv is not None:
            predicted = self.conv_offset(input)
            offset = predicted
            if self.offset_conv == "v2":
                third = predicted.shape[1] // 3
                offset, mask = predicted[:, : 2 * third], predicted[:, 2 * third :].sigmoid()
        assert offset is not None
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )

    def extra_repr(self) -> str:
        """The arguments that are not the defaults."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        text += f", padding={self.padding}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        text += ", bias=False" if self.bias is None else ""
        text += f", offset_conv={self.offset_conv!r}" if self.offset_conv else ""
        return text

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if self.offset_conv is not None:
            for part in ("weight", "bias"):
                older = state_dict.pop(f"{prefix}conv_offset_mask.{part}", None)
                if older is not None:
                    state_dict[f"{prefix}conv_offset.{part}"] = older
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def reference(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """The same by ``grid_sample`` and a matrix product, for finite offsets."""
    images, channels, height, width = input.shape
    outputs, group_channels, kh, kw = weight.shape
    taps, out = kh * kw, offset.shape[2:]
    groups = offset.shape[1] // (2 * taps)
    base_y = torch.arange(out[0]).mul(stride[0]).sub(padding[0])[:, None].to(offset)
    base_x = torch.arange(out[1]).mul(stride[1]).sub(padding[1])[None, :].to(offset)
    tap_y = torch.arange(taps).div(kw, rounding_mode="floor").mul(dilation[0])[:, None, None]
    tap_x = torch.arange(taps).remainder(kw).mul(dilation[1])[:, None, None]
    moves = offset.reshape(images * groups, taps, 2, *out)
    y = base_y + tap_y.to(offset) + moves[:, :, 0]
    x = base_x + tap_x.to(offset) + moves[:, :, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    columns = nn.functional.grid_sample(
        input.reshape(images * groups, -1, height, width),
        grid.reshape(images * groups, taps * out[0], out[1], 2),
        align_corners=False,
    ).reshape(images, groups, -1, taps, *out)
    if mask is not None:
        columns = columns * mask.reshape(images, groups, 1, taps, *out)
    columns = columns.reshape(images, channels // group_channels, group_channels * taps, -1)
    matrix = weight.reshape(channels // group_channels, -1, group_channels * taps)
    result = (matrix @ columns).reshape(images, outputs, *out)
    return result if bias is None else result + bias[:, None, None]
