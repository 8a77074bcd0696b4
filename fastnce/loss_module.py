"""The base of the loss modules: options that are checked when a module is made, and one of temperature and scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fastnce import arguments, statistics
from fastnce.logit_scale import LogitScale, StaysPrecise


class Loss(StaysPrecise):
    """A module that holds the options of a loss function, and its temperature or its scale, whichever was given.

    A float is held as it is, an nn.Parameter as a parameter, another tensor as a buffer, and a LogitScale as the submodule `logit_scale`.
    Temperature and scale can both be read, each as 1 over the other. Setting one drops the one held before.
    """

    _function: ClassVar[Callable[..., Tensor]]
    options: dict[str, Any]
    logit_scale: LogitScale  # where one is held

    def __init__(self, temperature: float | Tensor | None = None, scale: float | Tensor | LogitScale | None = None, **options: Any) -> None:
        super().__init__()
        where = self._where
        arguments.options(where, **{name: value for name, value in options.items() if name != "backend"})
        statistics.check_backend(where, options["backend"])
        arguments.not_both(where, temperature, scale)
        self.options = options
        if scale is not None:
            self.scale = scale
        else:
            self.temperature = arguments.TEMPERATURES[where] if temperature is None else temperature

    @property
    def _where(self) -> str:
        """The name of the loss function, with which messages begin, also those of the module."""
        return type(self)._function.__name__

    @property
    def temperature(self) -> float | Tensor:
        """The temperature as it was given, or 1 / scale; differentiable."""
        return self._value("temperature", "scale")

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        if isinstance(value, LogitScale):
            raise TypeError(f"{self._where}: a LogitScale is no temperature; give it as scale")
        self._hold("temperature", value)

    @property
    def scale(self) -> float | Tensor:
        """The scale as it was given, the value of a LogitScale, or 1 / temperature; differentiable."""
        return self._value("scale", "temperature")

    @scale.setter
    def scale(self, value: float | Tensor | LogitScale) -> None:
        self._hold("scale", value)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers a Parameter before it looks for a property.
        if name in ("temperature", "scale"):
            object.__setattr__(self, name, value)
        elif name == "logit_scale" and isinstance(value, LogitScale):
            self.scale = value
        elif name == "logit_scale" and not isinstance(value, nn.Module):
            given = f"{self._where}: logit_scale must be a LogitScale, got {type(value).__name__}"
            raise TypeError(f"{given}; a scale that is exponentiated already is set as scale")
        else:
            super().__setattr__(name, value)

    def _hold(self, name: str, value: Any) -> None:
        if not isinstance(value, LogitScale):
            arguments.held_scale(self._where, name, value)
        for store in (self.options, self._parameters, self._buffers, self._modules):
            for held in ("temperature", "scale", "logit_scale"):
                store.pop(held, None)
        if isinstance(value, LogitScale):
            super().__setattr__("logit_scale", value)
        elif isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            self.options[name] = value

    def _value(self, name: str, other: str) -> Any:
        held = self._held()
        if not held:  # nn.Module asks for an attribute of that name before it registers one
            raise AttributeError(f"{type(self).__name__} holds no {name}")
        return held[name] if name in held else 1 / held[other]

    def _held(self) -> dict[str, Any]:
        """{"temperature": ...} or {"scale": ...}; empty while one of them is being set."""
        if "logit_scale" in self._modules:
            return {"scale": self.logit_scale()}
        names, stores = ("temperature", "scale"), (self.options, self._parameters, self._buffers)
        held = {name: store[name] for store in stores for name in names if name in store}
        # torch.nn.utils.parametrize removes a tensor from these stores, and gives the class a property of that name.
        return held or {name: getattr(self, name) for name in names if getattr(type(self), name) is not getattr(Loss, name)}

    def _given(self) -> dict[str, Any]:
        held = self._held()
        if not held:
            raise AttributeError(f"{type(self).__name__} holds neither temperature nor scale any more: set one of them")
        return self.options | held

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Pickles of earlier versions hold return_stats, a default temperature, or a scale of None among the options.
        self.options.pop("return_stats", None)
        if self.options.get("scale", 0) is None:
            del self.options["scale"]
        if any("scale" in store for store in (self.options, self._parameters, self._buffers)):
            self.options.pop("temperature", None)
