"""What one process measures, and the row that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.table import Row


@dataclass(frozen=True)
class Cell:
    """One problem, one kind of measurement, and who is measured in one process."""

    measure: str  # "time", "memory", "gemm" or "kernels"
    loss: str
    n: int
    d: int
    names: tuple[str, ...]
    mode: str = "full"  # "fwd": forward with gradients enabled; "bwd": backward alone; "full": both
    dtype: str = "float32"
    threads: int = 1
    repeats: int = 5
    mem_limit: int = 0  # MiB of address space above the process with its inputs; 0: no limit
    device: str = "cpu"
    clock: str = "host"  # "device": as bench/gpu/measure.py measures; it falls back to the host's clock where the device has none
    backend: str = "auto"  # of fastnce
    noise: float = 0.5  # of the second view
    temperature: float = 0.0  # 0: that of dense.py
    seconds: float = 0.0  # stop the rounds of a device clock after that, if three are done; 0: never

    def title(self) -> str:
        return f"{self.measure:6} {self.mode:4} {self.loss:8} N={self.n:<7} D={self.d:<4} {self.dtype} {', '.join(self.names)}"


def row_of(cell: Cell, name: str, status: str, **measured: Any) -> Row:
    """The row of one contestant; table.py describes its fields."""
    problem = {"measure": cell.measure, "mode": cell.mode, "loss": cell.loss, "n": cell.n, "d": cell.d, "dtype": cell.dtype}
    return {**problem, "threads": cell.threads, "device": cell.device, "contestant": name, "status": status, **measured}
