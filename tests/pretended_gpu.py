"""A GPU that Triton compiles for, loads kernels into, and launches them on, where there is none: it notes every launch and runs nothing.

    launches = pretend()
    kernel[grid](...)
    launches[-1].arguments      addresses in the place of tensors

A process has compiled or interpreted kernels, never both: TRITON_INTERPRET must be 0 when Triton is imported. Tensors are those of the CPU.
"""

from __future__ import annotations

import hashlib
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class Launched(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class _Driver(DriverBase):  # type: ignore[misc]
    """What Triton asks of a driver, from compiling a kernel to calling its launcher."""

    def __init__(self, launches: list[Launched], architecture: int) -> None:
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
            load_binary=lambda name, kernel, shared, device: (1, f"{name} {hashlib.sha256(kernel).hexdigest()[:16]}", 0, 0, 1024),
            unload_module=lambda module: None,
        )
        self.architecture = architecture

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                pass

            def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
                _packed, _metadata, _enter, _exit, *arguments = rest
                plain = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
                launches.append(Launched(function, (x, y, z), stream, plain))

        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def pretend(architecture: int = 90) -> list[Launched]:
    """From now on this process has such a GPU. The list grows with every launch."""
    launches: list[Launched] = []
    driver.set_active(_Driver(launches, architecture))
    return launches
