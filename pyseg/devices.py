"""Devices: whether they are there, and what a computation on them takes."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .errors import DeviceError


def checked_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        DeviceError: torch knows none, or it is not there; the message says why.
    """
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"device={device!r} is no torch device: {reason}") from None
    if target.type == "cpu":
        return target
    if target.type == "cuda":
        count = torch.cuda.device_count()
        if torch.cuda.is_available() and (target.index or 0) < count:
            return target
        reason = (
            f"this torch ({torch.__version__}) is a build without CUDA"
            if torch.version.cuda is None
            else f"torch sees {count} CUDA devices"
        )
    elif target.type == "meta":
        reason = "its tensors hold no numbers, so nothing can be predicted there"
    else:
        try:  # the only question that every back end answers
            torch.zeros(1, device=target).cpu()
            return target
        except Exception as error:  # what is absent raises what its back end likes
            there = torch.accelerator.current_accelerator(check_available=True)
            cause = re.split(r"\. |\n", str(error))[0][:200]
            reason = (
                f"this torch ({torch.__version__}) cannot use it ({cause}); it has "
                f"{'no accelerator' if there is None else there}"
            )
    raise DeviceError(
        f"device={device!r} was asked for, but {reason}; use device='cpu', or see `pyseg doctor`"
    )


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; elsewhere float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def synchronize(device: torch.device) -> None:
    """Waits for what was started on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def count_flops(wanted: bool) -> Iterator[Callable[[], int | None]]:
    """Yields a function that, afterwards, gives the floating-point operations that torch counted.

    Where they are not ``wanted`` it gives None, and nothing is slowed down.
    """
    if not wanted:
        yield lambda: None
        return
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


@contextmanager
def measure_peak_memory(device: torch.device, wanted: bool) -> Iterator[Callable[[], int | None]]:
    """Yields a function that, afterwards, gives the bytes taken above what was held before.

    On the CPU from the kernel's high-water mark of the process (on Linux, else None), on CUDA
    from torch's allocator. None too where it is not ``wanted``.
    """
    peak: list[int | None] = [None]
    if not wanted or (device.type == "cpu" and not sys.platform.startswith("linux")):
        yield lambda: None
    elif device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: peak[0]
        peak[0] = torch.cuda.max_memory_allocated(device) - before
    else:
        # glibc keeps what was freed, and a stage that reuses it would seem to need nothing
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _proc_status("VmRSS")
        yield lambda: peak[0]
        peak[0] = max(0, _proc_status("VmHWM") - before)


def _proc_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
