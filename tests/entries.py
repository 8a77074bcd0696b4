"""Every way into the package, with arguments that it takes, and what tests of bad input and of unusual input say about a call."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from every_loss import parameter
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnce
from fastnce import (
    backends,
    clip_loss,
    contrastive_stats,
    info_nce,
    sup_con,
)
from train_ref.truth import LOSSES as TABLE
from train_ref.truth import Loss, Rows

BACKENDS = ("auto", *backends.BACKENDS)
HALVES = (torch.bfloat16, torch.float16)
MODES = ("real", "meta", "fake")


def x(*shape: int, seed: int = 0) -> Tensor:
    """Rows without pattern and without a zero; on the meta device or fake where that is switched on."""
    return (torch.arange(math.prod(shape)) * 0.7 + seed + 1).sin().reshape(shape)


def ids(n: int) -> Tensor:
    return torch.arange(n) // 2


def same(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def ragged(query: Tensor, positive_key: Tensor, values: Tensor, offsets: Tensor, **options: Any) -> Any:
    return info_nce(query, positive_key, (values, offsets), **options)


class Entry(NamedTuple):
    """One way into the package: valid arguments, which of them are features, what its scale is called, which are ids."""

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    features: tuple[str, ...]
    scale: str = "temperature"
    ids: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "info_nce" if self.function is ragged else self.function.__name__

    @property
    def rows(self) -> int:
        """How many anchors it has: two views of six examples, or six rows."""
        return 12 if self.features == ("z0", "z1") or self.arguments()[self.features[0]].dim() == 3 else 6

    def called(self, argument: str) -> str:
        """Its name in messages: the two of a ragged tuple as the caller writes them."""
        return {"values": "negative_keys[0]", "offsets": "negative_keys[1]"}.get(argument, argument)

    def __call__(self, **changes: Any) -> Any:
        return self.function(**(self.arguments() | changes))


def pair(a: str, b: str, *vectors: str, **more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {a: x(6, 5), b: x(6, 5, seed=1)} | {v: ids(6) for v in vectors} | {name: make() for name, make in more.items()}


KEYS = ("query", "positive_key")
MORE = (*KEYS, "negative_keys")
NCE_IDS = ("query_ids", "key_ids", "exclude_query_ids", "exclude_key_ids")
CLIP_IDS = ("image_ids", "text_ids")
STATS_IDS = ("q_labels", "k_labels", "q_exclude_ids", "k_exclude_ids")


def entry_of(loss: Loss) -> Entry:
    """A loss of the table as its example calls it."""
    number = {"temperature": {}, "logit_scale": {"logit_scale": 10.0}}[parameter(loss)]
    ids_of = tuple(set(loss.example(Rows(x(6, 5), x(6, 5), x(7, 5), ids(6)))) - set(loss.leaves))
    return Entry(
        getattr(fastnce, loss.name),
        lambda: loss.example(Rows(x(6, 5), x(6, 5, seed=1), x(7, 5, seed=2), ids(6))) | number,
        loss.leaves,
        parameter(loss),
        ids_of,
    )


ENTRIES = {name: entry_of(loss) for name, loss in TABLE.items()} | {
    "ids": Entry(info_nce, pair(*KEYS, *NCE_IDS), KEYS, ids=NCE_IDS),
    "unpaired": Entry(info_nce, pair(*KEYS, negative_keys=lambda: x(7, 5, seed=2)), MORE),
    "paired": Entry(info_nce, pair(*KEYS, negative_keys=lambda: x(6, 3, 5, seed=2), negative_mode=lambda: "paired"), MORE),
    "ragged": Entry(
        ragged, pair(*KEYS, values=lambda: x(6, 5, seed=2), offsets=lambda: torch.arange(7)), (*KEYS, "values"), ids=("offsets",)
    ),
    "views": Entry(sup_con, lambda: {"features": x(6, 2, 5), "labels": ids(6)}, ("features",), ids=("labels",)),
    "captions": Entry(clip_loss, pair("image", "text", *CLIP_IDS, logit_scale=lambda: 10.0), ("image", "text"), "logit_scale", CLIP_IDS),
    "stats": Entry(contrastive_stats, pair("q", "k", *STATS_IDS, scale=lambda: 10.0), ("q", "k"), "scale", STATS_IDS),
}
LOSSES = [name for name, entry in ENTRIES.items() if entry.name != "contrastive_stats"]
FEATURES = [(name, feature) for name, entry in ENTRIES.items() for feature in entry.features]
SEVERAL = [(name, feature) for name, feature in FEATURES if len(ENTRIES[name].features) > 1]
IDS = [(name, vector) for name, entry in ENTRIES.items() for vector in entry.ids]


def near(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Within rtol in float64; in float32, in which some backends compute, within a few roundings."""
    single = found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-6 if single else rtol, atol=1e-6 if single else 1e-13)


@contextlib.contextmanager
def raises(error: type[Exception], words: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Exactly this type, and a message that starts with these words; ... stands for anything."""
    with pytest.raises(error, match="^" + ".*".join(map(re.escape, words.split("...")))) as caught:
        yield caught
    assert caught.type is error


@contextlib.contextmanager
def kind(mode: str) -> Iterator[None]:
    """Tensors made inside are real, on the meta device, or fake."""
    with {"real": contextlib.nullcontext, "meta": lambda: torch.device("meta"), "fake": FakeTensorMode}[mode]():
        yield


def leaves_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, every floating-point tensor a leaf that asks for its gradient."""
    return {n: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}


def gradients(loss: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """By name, of every leaf."""
    leaves = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values()), retain_graph=True), strict=True))


def value_of(found: Any) -> Tensor:
    """A loss as it is; of statistics, all that are finite or nan."""
    return found if isinstance(found, Tensor) else torch.cat([v.masked_fill(v.isinf(), 0.0) for v in found[:3]])


def run(entry: Entry, arguments: dict[str, Any], backend: str = "torch", forward: Any = None) -> list[Tensor]:
    """Loss, computed inside a context, and gradients."""
    leaves = leaves_of(arguments)
    with forward or contextlib.nullcontext():
        loss = value_of(entry.function(**leaves, backend=backend))
    return [loss, *gradients(loss, leaves).values()]
