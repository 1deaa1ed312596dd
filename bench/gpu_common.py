"""Shared by the sections of bench.gpu: rows of the report, clocks, measured peaks of the GPU."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

FP32, BF16 = torch.float32, torch.bfloat16


class Row(NamedTuple):
    """One line of the report. status: ok, FAILED, measured (nothing to compare with) or skipped."""

    section: str
    check: str
    result: str
    limit: str = ""
    status: str = "measured"


class Finding(NamedTuple):
    """What a check yields: its name, what was seen, what was demanded (good None: nothing was)."""

    check: str
    result: str
    limit: str = ""
    good: bool | None = None


Check = Callable[["Setup"], Iterator[Finding]]


def below(check: str, value: float, limit: float) -> Finding:
    """A number that must not exceed its limit; NaN exceeds every limit."""
    return Finding(check, f"{value:.2e}", f"<= {limit:.0e}", value <= limit)


@dataclass
class Setup:
    """The device of this run and the sizes that suit it."""

    device: str
    small: bool  # toy sizes: to see on a CPU that every line works

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, function, repeats: int = 3) -> float:
        """Median seconds of a call after one warm-up, the device's queue drained around it."""
        function()
        times = []
        for _ in range(1 if self.small else repeats):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def describe(self) -> str:
        """Card, driver's CUDA, torch: one line."""
        text = f"torch {torch.__version__}, device {self.device}"
        if self.is_cuda:
            card = torch.cuda.get_device_properties(self.device)
            text += (
                f" ({card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability "
                f"{card.major}.{card.minor}, CUDA {torch.version.cuda}, NCCL "
                f"{'.'.join(map(str, torch.cuda.nccl.version()))})"
            )
        return text


class Peaks(NamedTuple):
    """What a plain copy and a plain product reach: bytes a second (read and written), FLOP/s."""

    copy: float
    matmul: dict[torch.dtype, float]


def measure_peaks(setup: Setup) -> Peaks:
    size, width = (1 << 20, 256) if setup.small else (1 << 30, 8192)  # bytes; rows and columns
    source = torch.ones(size, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    copy, rates = 2 * size / setup.seconds(lambda: target.copy_(source), 10), {}
    for dtype in (FP32, BF16):
        a = torch.randn(width, width, device=setup.device).to(dtype)
        rates[dtype] = 2 * width**3 / setup.seconds(lambda a=a: a @ a, 10)
    return Peaks(copy, rates)
