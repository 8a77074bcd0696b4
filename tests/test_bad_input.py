"""Bad input: the errors, with their types and words, and the values of input that has a defined result instead.

Types, shapes, dtypes, devices and Python numbers are known to the host, and raise always. Values that only the device knows have a defined
result, and raise in debug mode.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from every_loss import parameter
from named import each, widest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnce
from fastnce import (
    LogitScale,
    NegativeQueue,
    arguments,
    backends,
    clip_loss,
    contrastive_stats,
    dcl_loss,
    info_nce,
    moco_loss,
    nt_xent,
    sup_con,
)
from fastnce.backends import torch_tiles
from train_ref.truth import LOSSES as TABLE
from train_ref.truth import Loss, Rows, losses

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


@pytest.fixture(autouse=True)
def debug_mode_off() -> Iterator[None]:
    """With any FASTNCE_DEBUG."""
    with fastnce.debug(False):
        yield


# What raises ----------------------------------------------------------------------------------------------------------------------------

FEATURE_MISTAKES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "a number": (lambda t: 0.1, TypeError, "argument '{0}' must be Tensor, not float"),
    "int64": (lambda t: t.long(), TypeError, "{0} has dtype torch.int64; features must be float32, ...({0}.float())"),
    "bool": (lambda t: t > 0, TypeError, "{0} has dtype torch.bool; features must be float32"),
    "complex": (lambda t: t.to(torch.complex64), TypeError, "{0} has dtype torch.complex64; features must be float32"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), TypeError, "{0} has dtype torch.float8_e4m3fn; features must be float32"),
    "1-D": (lambda t: t.reshape(-1)[:5], ValueError, "expected {0} to be ...-D (rows, ...features), got shape (5,)"),
    "4-D": (lambda t: t.reshape(1, 1, -1, 5), ValueError, "expected {0} to be ...-D (rows, ...features), got shape (1, 1, "),
    "no columns": (lambda t: t[..., :0], ValueError, "{0} is (...0); it needs at least one feature column"),
}
LAYOUT_MISTAKES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda t: t.to_sparse(), "sparse_coo"),
    "csr": (lambda t: t.to_sparse_csr(), "sparse_csr"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), "nested"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantized"),
    "mkldnn": (lambda t: t.to_mkldnn(), "mkldnn"),
}


@pytest.mark.parametrize("mistake", FEATURE_MISTAKES)
@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_features(name: str, feature: str, mistake: str) -> None:
    entry, (spoil, error, words) = ENTRIES[name], FEATURE_MISTAKES[mistake]
    for mode in MODES:
        with kind(mode), raises(error, f"{entry.name}: {words.format(entry.called(feature))}"):
            entry(**{feature: spoil(entry.arguments()[feature])})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mistake", LAYOUT_MISTAKES)
@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_layouts_that_are_not_dense(name: str, feature: str, mistake: str) -> None:
    entry, (spoil, layout) = ENTRIES[name], LAYOUT_MISTAKES[mistake]
    start = f"{entry.name}: {entry.called(feature)} is a "
    with raises(NotImplementedError, f"{start}...{layout} tensor...does not support ...{layout} tensors; pass a dense"):
        entry(**{feature: spoil(entry.arguments()[feature])})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "feature"), SEVERAL)
def test_features_of_different_width(name: str, feature: str, mode: str) -> None:
    entry = ENTRIES[name]
    with kind(mode):
        given = entry.arguments()
        given[feature] = given[feature][..., :4]
        with raises(ValueError, f"{entry.name}: ...expected the same feature size, got ") as caught:
            entry.function(**given)
        shapes = re.findall(r"([\w\[\]]+) is (\(.*?\))", str(caught.value))
        assert entry.called(feature) in dict(shapes) and len(shapes) == 2
        for argument, shape in shapes:
            own = next(given[name] for name in entry.features if entry.called(name) == argument)
            assert shape == str(tuple(own.shape)), "a shape that the caller never gave"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "feature"), SEVERAL)
def test_features_of_different_dtypes(name: str, feature: str, mode: str) -> None:
    entry = ENTRIES[name]
    start = f"{entry.name}: Expected all features to have the same dtype, but got "
    with kind(mode), raises(RuntimeError, f"{start}...{entry.called(feature)}.dtype: float64"):
        entry(**{feature: entry.arguments()[feature].double()})


@pytest.mark.parametrize(
    ("name", "argument"), [*SEVERAL, *IDS, *((n, "weight") for n in LOSSES), *((n, ENTRIES[n].scale) for n in ENTRIES)]
)
def test_another_device(name: str, argument: str) -> None:
    """Never a silent copy: the message names the argument, and both devices."""
    entry = ENTRIES[name]
    given = entry.arguments().get(argument, torch.ones(6 if argument == "weight" else ()))
    given = (given if isinstance(given, Tensor) else torch.ones(())).to("meta")
    with raises(RuntimeError, f"{entry.name}: Expected all tensors to be on the same device, but found at least two devices, ") as caught:
        entry(**{argument: given})
    assert re.search(rf"[ (]{re.escape(entry.called(argument))} on (meta|cpu)", str(caught.value))


def test_another_device_of_a_mask_a_threshold_or_a_queue() -> None:
    mask, start = torch.eye(6, dtype=torch.bool, device="meta"), "Expected all tensors to be on the same device, but found"
    with raises(RuntimeError, f"sup_con: {start} ...mask on meta"):
        sup_con(x(6, 5), mask=mask)
    with raises(RuntimeError, f"contrastive_stats: {start} ...positive_mask on meta"):
        contrastive_stats(x(6, 5), x(6, 5), scale=1.0, positive_mask=mask)
    with raises(RuntimeError, f"contrastive_stats: {start} ...threshold on meta"):
        contrastive_stats(x(6, 5), x(6, 5), scale=1.0, offset=0, metrics=True, threshold=x(6).to("meta"))
    with raises(RuntimeError, f"NegativeQueue.enqueue: {start} ...keys on meta"):
        NegativeQueue(4, 5).enqueue(x(6, 5).to("meta"))


def test_temperature_on_the_host_for_features_on_a_gpu() -> None:
    """A number that happens to be a tensor is welcome; a parameter would get its gradient through a copy, and is refused."""
    with FakeTensorMode():
        z, temperature = torch.ones(6, 5, device="cuda"), torch.ones(())
        assert info_nce(z, z, temperature=temperature, backend="reference").device.type == "cuda"
        with raises(RuntimeError, "info_nce: Expected all tensors to be on the same device...temperature on cpu"):
            info_nce(z, z, temperature=temperature.requires_grad_(), backend="reference")
        with raises(RuntimeError, "info_nce: Expected all tensors to be on the same device...query on cuda:0, positive_key on cpu"):
            info_nce(z, z.cpu())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "vector"), IDS)
def test_ids(name: str, vector: str, mode: str) -> None:
    entry = ENTRIES[name]
    with kind(mode):
        given, called = entry.arguments()[vector], entry.called(vector)
        n = len(given)
        for wrong in (torch.float32, torch.complex64):
            with raises(TypeError, f"{entry.name}: {called} must have an integer dtype, got {wrong} ({called}.long())"):
                entry(**{vector: given.to(wrong)})
        with raises(TypeError, f"{entry.name}: argument '{called}' must be Tensor, not list"):
            entry(**{vector: [0] * n})
        with raises(ValueError, f"{entry.name}: Expected {called} batch_size ({n - 2}) to match ...batch_size ({n}); {called} must have "):
            entry(**{vector: given[2:]})
        with raises(ValueError, f"{entry.name}: ...{called} must have shape ({n},), got ({n}, 1); use {called}.reshape(-1)"):
            entry(**{vector: given[:, None]})


@pytest.mark.parametrize(("name", "given"), [("ids", v) for v in NCE_IDS] + [("captions", v) for v in CLIP_IDS])
def test_ids_of_one_side_only(name: str, given: str) -> None:
    """They serve both sides where row i of one belongs to row i of the other, and only there."""
    entry = ENTRIES[name]
    a, place = entry.features[0], entry.ids.index(given)
    partner, few, none = entry.ids[place ^ 1], (4, 6)[place % 2], dict.fromkeys(entry.ids)
    assert torch.equal(entry(**{partner: None}), entry())
    with raises(ValueError, f"{entry.name}: {partner} is missing: with 4 queries and 6 keys both ...are needed"):
        entry(**(none | {a: x(4, 5), given: ids(few)}))
    if name == "ids":
        # As many negatives as queries by chance: key j has nothing to do with query j, and must not inherit its id.
        with raises(ValueError, f"{entry.name}: {partner} is missing"):
            entry(**(none | {given: ids(6), "negative_keys": x(6, 5, seed=2)}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENTRIES)
def test_temperature(name: str, mode: str) -> None:
    entry = ENTRIES[name]
    start = f"{entry.name}: {entry.scale} must "
    with kind(mode):
        for number in (0.0, -0.5, 0, math.nan, math.inf, -math.inf):
            with raises(ValueError, f"{start}be a positive finite number, got {number}"):
                entry(**{entry.scale: number})
        for wrong in (True, "0.1", [0.1]):
            with raises(TypeError, f"{start}be a float or a one-element tensor, got {type(wrong).__name__}"):
                entry(**{entry.scale: wrong})
        with raises(ValueError, f"{start}have exactly one element, got shape (2,)"):
            entry(**{entry.scale: torch.ones(2)})
        with raises(TypeError, f"{start}have a floating-point dtype, got torch.int64"):
            entry(**{entry.scale: torch.ones((), dtype=torch.int64)})
        if entry.scale == "temperature":
            with raises(ValueError, f"{entry.name}: give temperature or scale, not both"):
                entry(temperature=0.3, scale=2.0)
            with raises(ValueError, f"{entry.name}: scale must be a positive finite number, got 0.0"):
                entry(scale=0.0)


@pytest.mark.parametrize("name", ENTRIES)
def test_temperature_out_of_the_range_of_float32(name: str) -> None:
    """Itself, or its reciprocal, is no float32 number: a complaint about what the caller gave."""
    for number in (1e300, *((1e-39, 1e-320) if ENTRIES[name].scale == "temperature" else ())):
        with raises(ValueError, f"{ENTRIES[name].name}: {ENTRIES[name].scale} ...{number}"):
            ENTRIES[name](**{ENTRIES[name].scale: number})


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_and_weights(name: str) -> None:
    entry, n = ENTRIES[name], ENTRIES[name].rows
    for wrong in ("foo", None, "Mean"):
        with raises(ValueError, f"{entry.name}: {wrong!r} is not a valid value for reduction; use one of 'none', 'mean', 'sum'"):
            entry(reduction=wrong)
    with raises(TypeError, f"{entry.name}: argument 'weight' must be Tensor, not list"):
        entry(weight=[1.0] * n)
    with raises(TypeError, f"{entry.name}: weight must have a floating-point dtype, got torch.int64 (weight.float())"):
        entry(weight=torch.ones(n, dtype=torch.int64))
    for shape in ((n, 1), (n + 1,), ()):
        with raises(ValueError, f"{entry.name}: weight must have shape ({n},), one per anchor, got {shape}"):
            entry(weight=torch.ones(shape))


@pytest.mark.parametrize("name", ENTRIES)
def test_unknown_backend(name: str) -> None:
    words = f"{ENTRIES[name].name}: 'tritn' is not a valid value for backend; use 'auto' or one of ...'cpu', 'torch', 'reference'"
    with raises(ValueError, words):
        ENTRIES[name](backend="tritn")


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tiles, "unsupported", lambda problem: ["rows too wide", "dtype too odd"])
    with raises(NotImplementedError, "info_nce: no backend for query (6, 5) float32 cpu:\n  torch: rows too wide; dtype too odd"):
        info_nce(x(6, 5), x(6, 5), backend="torch")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "argument"), [("sup_con", "mask"), ("stats", "positive_mask")])
def test_masks(name: str, argument: str, mode: str) -> None:
    entry = ENTRIES[name]
    none = dict.fromkeys(entry.ids)
    with kind(mode):
        with raises(TypeError, f"{entry.name}: argument '{argument}' must be Tensor, not list"):
            entry(**none, **{argument: [True]})
        with raises(TypeError, f"{entry.name}: {argument} must have dtype torch.bool, got torch.float32 ({argument}.bool())"):
            entry(**none, **{argument: torch.ones(6, 6)})
        for shape in ((6,), (6, 0), *([(6, 5)] if name == "sup_con" else [])):
            with raises(ValueError, f"{entry.name}: {argument} must be ...got shape {shape}"):
                entry(**none, **{argument: torch.ones(shape, dtype=torch.bool)})


VALUE_ERRORS: dict[str, Callable[[], object]] = {
    "info_nce: query is (6, 5) and positive_key is (4, 5); row i of": lambda: info_nce(x(6, 5), x(4, 5)),
    "info_nce: query is (3, 5) and positive_key is (4, 5); row i of": lambda: info_nce(x(3, 5), x(4, 5), x(7, 5)),
    "info_nce: symmetric=True needs as many keys as queries": lambda: info_nce(x(6, 5), x(7, 5), symmetric=True),
    "info_nce: symmetric=True needs ...no negative_keys": lambda: info_nce(x(6, 5), x(6, 5), x(2, 5), symmetric=True),
    "info_nce: in_batch=False needs negative_keys": lambda: info_nce(x(6, 5), x(6, 5), in_batch=False),
    "info_nce: 'foo' is not a valid value for negative_mode; use ": lambda: info_nce(x(6, 5), x(6, 5), x(6, 5), negative_mode="foo"),
    "info_nce: negative_keys is (0, 5); at least one key is needed": lambda: ENTRIES["unpaired"](negative_keys=x(0, 5)),
    "info_nce: negative_keys is (6, 0, 5); at least one key is": lambda: ENTRIES["paired"](negative_keys=x(6, 0, 5)),
    "info_nce: negative_keys is (4, 3, 5) and query is (6, 5); paired": lambda: ENTRIES["paired"](negative_keys=x(4, 3, 5)),
    "info_nce: ragged negative_keys is (values, offsets), got 1": lambda: info_nce(x(6, 5), x(6, 5), (x(3, 5),)),
    "info_nce: negative_keys[0] is (0, 5); at least one key is needed; with in_batch=True": lambda: ENTRIES["ragged"](
        values=x(0, 5), offsets=torch.zeros(7, dtype=torch.int64)
    ),
    "info_nce: 'ragged' is not a valid value for negative_mode; ...tuple (values (T, D), offsets (M + 1,))": lambda: ENTRIES["ragged"](
        negative_mode="ragged"
    ),
    "info_nce: negative_keys[1] has 6 entries, one per query; ...torch.nn.functional.pad(counts.cumsum(0), (1, 0))": lambda: ENTRIES[
        "ragged"
    ](offsets=torch.ones(6, dtype=torch.int64)),
    "info_nce: expected negative_keys to be 2-D or 3-D, got one number: ...temperature=": lambda: info_nce(
        x(6, 5), x(6, 5), torch.tensor(0.07)
    ),
    "info_nce: expected negative_keys to be ...got one number: ...by its name": lambda: info_nce(x(6, 5), x(6, 5), torch.tensor([0.07])),
    "info_nce: ids relate queries to in-batch or unpaired keys, and there": lambda: ENTRIES["paired"](query_ids=ids(6)),
    "info_nce: query has 2147483648 rows; at most 2^31 - 1": lambda: info_nce(torch.zeros(1, 1).expand(2**31, 1), x(6, 1)),
    "dcl_loss: z0 is (5, 5); without z1 it holds two views, ...an even number of rows": lambda: dcl_loss(x(5, 5)),
    "nt_xent: z0 is (5, 5); without z1 it holds two views, ...an even number of rows": lambda: nt_xent(x(5, 5)),
    "nt_xent: z0 is (6, 5) and z1 is (5, 5); two views have the same number": lambda: nt_xent(x(6, 5), x(5, 5)),
    "sup_con: Cannot define both `labels` and `mask`": lambda: sup_con(x(6, 5), ids(6), torch.ones(6, 6, dtype=torch.bool)),
    "sup_con: features is (6, 0, 5); it needs at least one view": lambda: sup_con(x(6, 0, 5)),
    "sup_con: 'foo' is not a valid value for variant; use one of 'out', 'in'": lambda: sup_con(x(6, 5), ids(6), variant="foo"),
    "sup_con: 'foo' is not a valid value for views; use one of 'all', 'one'": lambda: sup_con(x(6, 5), ids(6), views="foo"),
    "sup_con: 'foo' is not a valid value for no_positive; use one of": lambda: sup_con(x(6, 5), ids(6), no_positive="foo"),
    "clip_loss: image is (6, 5) and text is (4, 5); without image_ids and text_ids": lambda: clip_loss(x(6, 5), x(4, 5), 10.0),
    "clip_loss: logit_bias must be a finite number, got nan": lambda: clip_loss(x(6, 5), x(6, 5), 10.0, math.nan),
    "moco_loss: q is (6, 5) and k is (5, 5); row i of k is the positive": lambda: moco_loss(x(6, 5), x(5, 5), x(7, 5)),
    "moco_loss: queue is (0, 5); at least one key is needed": lambda: moco_loss(x(6, 5), x(6, 5), x(0, 5)),
    "moco_loss: q is (6, 5) and queue is (4, 6); expected the same": lambda: moco_loss(x(6, 5), x(6, 5), NegativeQueue(4, 6)),
    "contrastive_stats: k is (0, 5); at least one key is needed": lambda: contrastive_stats(x(6, 5), x(0, 5), scale=1.0),
    "contrastive_stats: two_sided needs k": lambda: contrastive_stats(x(6, 5), scale=1.0, two_sided=True),
    "contrastive_stats: offset is 0; ...must be at least 1": lambda: contrastive_stats(x(6, 5), scale=1.0, offset=0),
    "contrastive_stats: k_labels and k_exclude_ids need k": lambda: contrastive_stats(x(6, 5), scale=1.0, k_labels=ids(6)),
    "contrastive_stats: q_labels and k_labels go together": lambda: ENTRIES["stats"](k_labels=None),
    "contrastive_stats: q_exclude_ids and k_exclude_ids go together": lambda: ENTRIES["stats"](q_exclude_ids=None),
    "contrastive_stats: threshold must have shape (6,)": lambda: ENTRIES["stats"](metrics=True, threshold=x(5)),
    "contrastive_stats: threshold ...needs metrics=True": lambda: ENTRIES["stats"](threshold=x(6)),
    "NegativeQueue.enqueue: keys is (3, 3); this queue holds rows of 2": lambda: NegativeQueue(4, 2).enqueue(x(3, 3)),
    "NegativeQueue.enqueue: expected keys to be 2-D ...got shape (2,)": lambda: NegativeQueue(4, 2).enqueue(x(2)),
    "NegativeQueue: size must be a positive integer, got 0": lambda: NegativeQueue(0, 2),
    "NegativeQueue: size must be a positive integer, got 2.0": lambda: NegativeQueue(2.0, 2),
    "NegativeQueue: dim must be a positive integer, got -1": lambda: NegativeQueue(4, -1),
    "NegativeQueue: dim must be a positive integer, got True": lambda: NegativeQueue(4, True),
    "LogitScale: init must be positive and at most max, got init=0.0, max=100.0": lambda: LogitScale(0.0),
    "LogitScale: init must be positive and at most max, got init=200.0, max=100.0": lambda: LogitScale(200.0),
    "LogitScale: init must be positive and at most max, got init=nan, max=None": lambda: LogitScale(math.nan, None),
    "LogitScale: init must be positive and at most max, got init=inf, max=None": lambda: LogitScale(math.inf, None),
    "LogitScale: init must be positive and at most max, got init=1.0, max=nan": lambda: LogitScale(1.0, math.nan),
}
TYPE_ERRORS: dict[str, Callable[[], object]] = {
    "info_nce: argument 'negative_keys' must be Tensor, not NegativeQueue": lambda: info_nce(x(6, 5), x(6, 5), NegativeQueue(4, 5)),
    "info_nce: argument 'negative_keys' must be Tensor, not float: ...temperature=0.07": lambda: info_nce(x(6, 5), x(6, 5), 0.07),
    "info_nce: argument 'negative_keys' must be Tensor, not int: ...temperature=1": lambda: fastnce.InfoNCE()(x(6, 5), x(6, 5), 1),
    "info_nce: argument 'negative_keys[0]' must be Tensor, not list": lambda: ENTRIES["ragged"](values=[[1.0]]),
    "moco_loss: argument 'queue' must be Tensor, not list": lambda: ENTRIES["moco_loss"](queue=[[1.0]]),
    "clip_loss: logit_bias must be a float or a one-element tensor, got str": lambda: clip_loss(x(6, 5), x(6, 5), 10.0, "0"),
    "contrastive_stats: offset must be an integer, got ...1.5": lambda: ENTRIES["stats"](offset=1.5),
    "contrastive_stats: argument 'threshold' must be Tensor, not float": lambda: ENTRIES["stats"](metrics=True, threshold=0.5),
    "NegativeQueue.enqueue: argument 'keys' must be Tensor, not list": lambda: NegativeQueue(4, 2).enqueue([[1.0, 2.0]]),
    "NegativeQueue.enqueue: keys has dtype torch.int64; features must be": lambda: NegativeQueue(4, 2).enqueue(ids(4).view(2, 2)),
    "NegativeQueue: dtype must be ...torch.int64": lambda: NegativeQueue(4, 2, dtype=torch.int64),
    "LogitScale: init ...str": lambda: LogitScale("10"),
}


@pytest.mark.parametrize(("error", "words"), [(ValueError, w) for w in VALUE_ERRORS] + [(TypeError, w) for w in TYPE_ERRORS])
def test_message(error: type[Exception], words: str) -> None:
    for mode in MODES:
        with kind(mode), raises(error, words):
            (VALUE_ERRORS if error is ValueError else TYPE_ERRORS)[words]()


@pytest.mark.parametrize(
    ("twin", "function", "shapes"),
    [
        (fastnce.InfoNCE, info_nce, [(6, 5), (4, 5)]),
        (fastnce.NTXentLoss, nt_xent, [(6, 5), (5, 5)]),
        (fastnce.DCLLoss, dcl_loss, [(6, 5), (5, 5)]),
        (fastnce.SupConLoss, sup_con, [(6, 0, 5)]),
        (fastnce.ClipLoss, lambda *z, **options: clip_loss(*z, 10.0, **options), [(6, 5), (4, 5)]),
        (lambda **options: fastnce.MoCoLoss(4, 5, **options), lambda *z, **options: moco_loss(*z, x(4, 5), **options), [(6, 5), (5, 5)]),
    ],
)
def test_modules_raise_what_their_functions_raise(twin: Any, function: Any, shapes: list[tuple[int, ...]]) -> None:
    wrong, right = [x(*shape) for shape in shapes], [x(6, 2, 5) if len(shape) == 3 else x(6, 5) for shape in shapes]
    for inputs, options in ((wrong, {}), (right, {"reduction": "foo"}), (right, {"backend": "tritn"})):
        with pytest.raises(ValueError, match=": ") as expected:
            function(*inputs, **options)
        with raises(ValueError, str(expected.value)):
            twin(**options)(*inputs)


# What has a value -----------------------------------------------------------------------------------------------------------------------


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


def assert_nothing_to_learn(loss: Tensor, arguments: dict[str, Any]) -> None:
    assert torch.equal(loss, torch.zeros_like(loss))
    for name, gradient in gradients(loss, arguments).items():
        assert torch.equal(gradient, torch.zeros_like(arguments[name])), name


EMPTY: dict[str, tuple[str, dict[str, Callable[[], Any]]]] = {
    **{name: (name, {"queue": lambda: x(7, 5)} if "queue" in ENTRIES[name].features else {}) for name in (*TABLE, "ids", "captions")},
    "more keys": ("info_nce", {"positive_key": lambda: x(3, 5)}),
    "symmetric": ("info_nce", {"symmetric": lambda: True}),
    "unpaired": ("unpaired", {"negative_keys": lambda: x(7, 5)}),
    "paired": ("paired", {"negative_keys": lambda: x(0, 3, 5)}),
    "paired, none each": ("paired", {"negative_keys": lambda: x(0, 0, 5)}),
    "ragged": ("ragged", {"offsets": lambda: same(1)}),
    "nt_xent, one tensor": ("nt_xent", {"z1": lambda: None}),
    "simclr": ("sup_con", {"labels": lambda: None}),
    "mask": ("sup_con", {"labels": lambda: None, "mask": lambda: torch.zeros(0, 0, dtype=torch.bool)}),
    "views": ("views", {"features": lambda: x(0, 2, 5)}),
    "one view": ("views", {"features": lambda: x(0, 2, 5), "views": lambda: "one"}),
}


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("case", EMPTY)
def test_empty_batch(case: str, backend: str) -> None:
    """none: an empty vector; sum: 0 with zero gradients; mean: an error, where torch gives a silent nan."""
    name, changes = EMPTY[case]
    entry = ENTRIES[name]
    arguments = {n: v[:0] if isinstance(v, Tensor) else v for n, v in entry.arguments().items()}
    arguments = leaves_of(arguments | {n: make() for n, make in changes.items()} | {entry.scale: torch.tensor(0.5)})
    with raises(ValueError, f"{entry.name}: expected at least 1 row for reduction='mean', got 0"):
        entry.function(**arguments, backend=backend)
    for reduction, shape in (("none", (0,)), ("sum", ())):
        loss = entry.function(**arguments, reduction=reduction, backend=backend)
        assert loss.shape == shape and loss.dtype == torch.float32
        assert_nothing_to_learn(loss, arguments)


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("name", [*(n for n in TABLE if "queue" not in TABLE[n].leaves), "symmetric", "ids", "views", "captions"])
def test_batch_of_one(name: str, backend: str) -> None:
    """One positive and nothing else: log(1) = 0, and nothing to learn."""
    entry = ENTRIES[{"symmetric": "info_nce"}.get(name, name)]
    options: dict[str, Any] = {"symmetric": True} if name == "symmetric" else {}
    arguments = {n: v[:1] if isinstance(v, Tensor) else v for n, v in entry.arguments().items()}
    arguments = leaves_of(arguments | {entry.scale: torch.tensor(0.5)})
    for reduction in ("none", "mean", "sum"):
        assert_nothing_to_learn(entry.function(**arguments, **options, reduction=reduction, backend=backend), arguments)


NO_POSITIVE: dict[str, dict[str, Tensor]] = {
    "labels": {"labels": torch.arange(6)},
    "negative labels": {"labels": torch.full((6,), -1)},
    "mask": {"mask": torch.zeros(6, 6, dtype=torch.bool)},
    "mask of self": {"mask": torch.eye(6, dtype=torch.bool)},
}


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("no_positive", ["zero", "skip"])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("case", NO_POSITIVE)
def test_no_anchor_has_a_positive(case: str, variant: str, no_positive: str, backend: str) -> None:
    arguments = leaves_of({"features": x(6, 5), "temperature": torch.tensor(0.02)})
    options: dict[str, Any] = NO_POSITIVE[case] | {"variant": variant, "backend": backend}
    for reduction in ("none", "mean", "sum"):
        assert_nothing_to_learn(sup_con(**arguments, **options, reduction=reduction, no_positive=no_positive), arguments)
    with raises(ValueError, "sup_con: anchor 0 has no positive; give it one, or use no_positive='zero' or 'skip'"):
        sup_con(**arguments, **options, no_positive="error")


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("name", ["in-batch", "symmetric", "unpaired", "in-batch and unpaired"])
def test_ids_exclude_everything(name: str, temperature: float, backend: str) -> None:
    arguments = {"query": x(6, 5), "positive_key": x(6, 5, seed=1), "temperature": torch.tensor(temperature)}
    if "unpaired" in name:
        arguments["negative_keys"] = x(7, 5, seed=2)
    arguments, keys = leaves_of(arguments), {"unpaired": 7, "in-batch and unpaired": 13}.get(name, 6)
    options = {
        "exclude_query_ids": same(6),
        "exclude_key_ids": same(keys),
        "in_batch": name != "unpaired",
        "symmetric": name == "symmetric",
    }
    assert_nothing_to_learn(info_nce(**arguments, **options, backend=backend), arguments)


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("symmetric", [True, False])
def test_statistics_of_no_pairs(symmetric: bool, backend: str) -> None:
    """-inf, -inf, 0 and 0, and upstream gradients of any size come to nothing."""
    arguments = leaves_of({"q": x(6, 5), "k": None if symmetric else x(7, 5), "scale": torch.tensor(2.0), "bias": torch.tensor(1.0)})
    rules = {"q_exclude_ids": same(6), "k_exclude_ids": None if symmetric else same(7), "metrics": True, "two_sided": not symmetric}
    whole = contrastive_stats(**arguments, **rules, backend=backend)
    for found in (whole,) if symmetric else (whole, whole.columns):
        n = len(found.pos)
        assert found.lse_neg.tolist() == found.lse_pos.tolist() == found.hardest_logit.tolist() == found.pos_max.tolist() == [-math.inf] * n
        assert found.pos.tolist() == found.n_pos.tolist() == found.rank.tolist() == found.ties.tolist() == [0] * n
        assert found.hardest.tolist() == [-1] * n
        for gradient in gradients(found.lse_neg + 1e3 * found.lse_pos - 1e6 * found.pos, arguments).values():
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("variant", ["out", "in"])
def test_all_labels_equal(variant: str, backend: str) -> None:
    """Everything is a positive: log sum - mean of s, or the log of their number."""
    z = x(6, 5).to(widest(backend)).requires_grad_()
    loss = sup_con(z, same(6), temperature=0.3, variant=variant, reduction="none", backend=backend)
    s = (F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 0.3)[~torch.eye(6, dtype=torch.bool)].view(6, 5)
    expected = s.logsumexp(1) - s.mean(1) if variant == "out" else s.sum(1) * 0 + math.log(5)
    near(loss, expected, 1e-13)
    near(*(torch.autograd.grad(f.sum(), z)[0] for f in (loss, expected)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize(("name", "vector"), [(n, v) for n, v in IDS if v != "offsets"])
def test_ids_of_every_integer_dtype(name: str, vector: str, dtype: torch.dtype) -> None:
    entry = ENTRIES[name]
    binary = {v: ids(6) % 2 for v in entry.ids}
    expected, found = entry(**binary), entry(**(binary | {vector: binary[vector].to(dtype)}))
    assert torch.equal(value_of(found), value_of(expected))


@pytest.mark.parametrize("backend", each(BACKENDS))
def test_any_value_of_an_id(backend: str) -> None:
    """Equality is all that counts: 255 is no negative number, and neighbours near 2^62 are different; only negative ones match nothing."""
    z, few = x(6, 5), ids(6)
    expected = sup_con(z, few, backend=backend)
    for labels in (few + 2**62, 2**63 - 1 - few, (255 - few).to(torch.uint8), few * 1000 + 7):
        assert torch.equal(sup_con(z, labels, backend=backend), expected)
    alone = sup_con(z, torch.tensor([0, 0, 1, 1, -1, -1]), reduction="none", backend=backend)
    assert alone[:4].all() and alone[4:].tolist() == [0.0, 0.0]


# Rows of length 0, beyond 1e18, nan and inf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("length", [0.0, 9e-13])
@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_zero_row(name: str, feature: str, length: float, backend: str) -> None:
    """Similarity 0 as in F.normalize, and a gradient of exactly 0 where that one's is 1e12."""
    entry = ENTRIES[name]
    for dtype in dict.fromkeys((widest(backend), torch.float32, *(HALVES if length == 0 else ()))):
        arguments = {n: v.to(dtype) if n in entry.features else v for n, v in entry.arguments().items()}
        row = arguments[feature][2]
        row.mul_(length / row.norm(dim=-1, keepdim=True))
        arguments = leaves_of(arguments)
        loss = value_of(entry.function(**arguments, backend=backend))
        found = gradients(loss, arguments)
        assert torch.isfinite(loss).all() and all(torch.isfinite(g).all() for g in found.values())
        assert not found[feature][2].any() and found[feature][0].any()
        if dtype == widest(backend):
            arguments[feature].data[2] = 0.0
            unit = {n: F.normalize(v.detach(), dim=-1) if n in entry.features else v for n, v in arguments.items()}
            expected = value_of(entry.function(**unit, normalize=False, backend=backend))
            near(loss, expected, 1e-12)


@pytest.mark.parametrize("backend", each(BACKENDS))
def test_all_rows_zero(backend: str) -> None:
    """All similarities 0: log of the number of candidates, and no gradient anywhere."""
    z = torch.zeros(4, 3, dtype=widest(backend), requires_grad=True)
    for loss, candidates in (
        (info_nce(z, z, backend=backend), 4),
        (nt_xent(z, backend=backend), 3),
        (moco_loss(z, z, z, backend=backend), 5),
    ):
        assert loss.item() == pytest.approx(math.log(candidates), rel=1e-15 if z.dtype == torch.float64 else 1e-7)
        assert not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_the_length_of_a_row_does_not_matter_up_to_the_limits(name: str, feature: str, backend: str) -> None:
    entry = ENTRIES[name]
    arguments = entry.arguments() | {"backend": backend}
    unit = F.normalize(arguments[feature], dim=-1)
    expected = value_of(entry.function(**(arguments | {feature: unit})))
    for length in (2e-12, 9e17):
        found = value_of(entry.function(**(arguments | {feature: unit * length})))
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    if widest(backend) == torch.float64:
        doubles = {n: v.double() if n in entry.features else v for n, v in arguments.items()}
        found = value_of(entry.function(**(doubles | {feature: unit.double() * 1e150})))
        torch.testing.assert_close(found, expected.double(), rtol=2e-6, atol=2e-6)


DENSE: dict[str, Callable[..., Tensor]] = {
    **{name: partial(loss.function, **{loss.number: 1.0}) for name, loss in TABLE.items() if not ENTRIES[name].ids},
    **dict.fromkeys(("unpaired", "paired"), partial(losses.info_nce, scale=1.0)),
    "ragged": lambda query, positive_key, values: losses.info_nce(query, positive_key, values[:, None], scale=1.0),
}


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2e18])
@pytest.mark.parametrize(("name", "feature"), [(n, f) for n, f in FEATURES if n in DENSE])
def test_nan_reaches_the_rows_that_it_reaches_in_torch(name: str, feature: str, bad: float, backend: str) -> None:
    """In losses and in gradients, row by row. A finite row that is too long counts as nan (torch: as similarity 0)."""
    entry = ENTRIES[name]
    given = entry.arguments()
    given[feature][2].view(-1)[3] = bad
    arguments = leaves_of(given | {entry.scale: 1.0})
    found = entry.function(**arguments, reduction="none", backend=backend)
    dense = leaves_of({n: given[n].clone() for n in entry.features})
    if bad == 2e18:
        dense[feature].data[2].view(-1)[3] = math.nan
    expected = DENSE[name](*dense.values())
    assert found.isnan().any()
    torch.testing.assert_close(found, expected, equal_nan=True)
    for (n, gradient), wanted in zip(gradients(found, arguments).items(), gradients(expected, dense).values(), strict=True):
        assert torch.equal(gradient.isnan(), wanted.isnan()), n
    assert entry.function(**arguments, backend=backend).isnan()


@pytest.mark.parametrize("backend", each(BACKENDS[1:]))
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rules", ["aligned", "aligned, ids", "labels", "labels, ids"])
@pytest.mark.parametrize("shape", ["rows", "two_sided", "symmetric"])
def test_nan_of_an_excluded_pair(shape: str, rules: str, bad: float, scale: float, backend: str, small_tiles: int) -> None:
    """One bad row on either side: every statistic of every row and column is nan where torch's is, and where it is not, equal."""
    m, n = (40, 40) if shape == "symmetric" else (20, 40)
    i, j = torch.arange(m)[:, None], torch.arange(n)
    excluded = i == j if shape == "symmetric" else torch.zeros(m, n, dtype=torch.bool)
    positive = (i - j).abs() == 20 if shape == "symmetric" else i == j
    label, document = torch.arange(n) // 3, torch.arange(n) % 4
    options: dict[str, Any] = {"offset": 20 if shape == "symmetric" else 0, "two_sided": shape == "two_sided"}
    if "ids" in rules:
        excluded |= (document[:m, None] == document) & ~positive
        options |= {"q_exclude_ids": document[:m]} | ({} if shape == "symmetric" else {"k_exclude_ids": document})
    if "labels" in rules:
        positive |= (label[:m, None] == label) & ~excluded
        options |= {"q_labels": label[:m]} | ({} if shape == "symmetric" else {"k_labels": label})
    for side, row in ((0, 7), (0, 19), (1, 2), (1, 39)):
        q, k = x(m, 5), None if shape == "symmetric" else x(n, 5, seed=1)
        (q if side == 0 or k is None else k)[row, 1] = bad
        found = contrastive_stats(q, k, scale=scale, backend=backend, **options)
        s = scale * F.normalize(q, dim=1) @ F.normalize(q if k is None else k, dim=1).T
        views = [(found, s, positive, excluded)] + ([(found.columns, s.T, positive.T, excluded.T)] if shape == "two_sided" else [])
        for got, t, plus, out in views:
            lse_neg, lse_pos = (t.masked_fill(~kept, -torch.inf).logsumexp(1) for kept in (~(plus | out), plus))
            pos = t.masked_fill(~plus, 0.0).sum(1) / plus.sum(1).clamp(min=1)
            assert lse_neg.isnan().any() and not lse_pos.isnan().all()
            for have, want in ((got.lse_neg, lse_neg), (got.lse_pos, lse_pos), (got.pos, pos)):
                torch.testing.assert_close(have, want, equal_nan=True, rtol=1e-5, atol=1e-4)


# Temperatures, views and dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_temperature_tensors(name: str, dtype: torch.dtype) -> None:
    """The value of the float, a gradient of the tensor's own shape and dtype."""
    entry = ENTRIES[name]
    for shape in ((), (1,), (1, 1)):
        temperature = torch.full(shape, 0.25, dtype=dtype, requires_grad=True)
        loss = value_of(entry(**{entry.scale: temperature})).sum()
        torch.testing.assert_close(loss, value_of(entry(**{entry.scale: 0.25})).sum(), rtol=1e-6, atol=0)
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss, temperature)
        assert gradient.shape == shape and gradient.dtype == dtype and gradient.any()


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("value", [0.0, -0.5, math.nan])
@pytest.mark.parametrize("name", ENTRIES)
def test_temperature_tensor_that_makes_no_sense(name: str, value: float, backend: str) -> None:
    """Only the device knows its value: nan, as for a division by zero (a scale of 0 is none); debug mode raises."""
    entry = ENTRIES[name]
    temperature = torch.tensor(value)
    if entry.scale == "temperature" or value != 0:
        assert value_of(entry(**{entry.scale: temperature}, backend=backend)).isnan().any()
    with fastnce.debug(), raises(ValueError, f"{entry.name}: {entry.scale} "):
        entry(**{entry.scale: temperature}, backend=backend)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every other row": lambda t: t.repeat_interleave(2, 0)[1::2],
    "columns of a wider matrix": lambda t: F.pad(t, (2, 1))[..., 2:-1],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "one row for all": lambda t: t[:1].expand(t.shape),
    "one number per row": lambda t: t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_views_of_other_tensors(name: str, feature: str, layout: str, backend: str) -> None:
    entry = ENTRIES[name]
    arguments = {n: v.to(widest(backend)) if n in entry.features else v for n, v in entry.arguments().items()}
    view = LAYOUTS[layout](arguments[feature])
    dense = view.clone(memory_format=torch.contiguous_format)
    assert view.stride() != dense.stride() or view.storage_offset() > 0
    results = []
    for given in (view, dense):
        leaves = leaves_of(arguments | {feature: given})
        loss = value_of(entry.function(**leaves, backend=backend))
        results.append((loss, gradients(loss, leaves)))
    near(*(loss for loss, _ in results), 1e-13)
    for n in results[0][1]:
        assert results[0][1][n].shape == arguments[n].shape
        near(*(found[n] for _, found in results), 1e-12)


def test_views_of_ids_masks_and_weights() -> None:
    z, labels, weight = x(6, 5), ids(6), x(6).abs()
    mask = labels[:, None] <= labels
    for a, b in (
        (sup_con(z, labels.repeat_interleave(2)[::2]), sup_con(z, labels)),
        (sup_con(z, labels[:1].expand(6)), sup_con(z, same(6))),
        (sup_con(z, mask=mask.T.contiguous().T), sup_con(z, mask=mask)),
        (sup_con(z, mask=mask[:1].expand(6, 6)), sup_con(z, mask=mask[:1].repeat(6, 1))),
        (sup_con(z, labels, weight=weight.repeat_interleave(2)[::2]), sup_con(z, labels, weight=weight)),
        (sup_con(z, labels, weight=weight[:1].expand(6)), sup_con(z, labels, weight=weight[:1].repeat(6))),
    ):
        assert torch.equal(a, b)


def run(entry: Entry, arguments: dict[str, Any], backend: str = "torch", forward: Any = None) -> list[Tensor]:
    """Loss, computed inside a context, and gradients."""
    leaves = leaves_of(arguments)
    with forward or contextlib.nullcontext():
        loss = value_of(entry.function(**leaves, backend=backend))
    return [loss, *gradients(loss, leaves).values()]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("name", "feature"), SEVERAL)
def test_mixed_dtypes_under_autocast_are_an_explicit_cast(name: str, feature: str, dtype: torch.dtype) -> None:
    """Bit by bit: all features in the autocast dtype, gradients in the dtype of each."""
    entry = ENTRIES[name]
    arguments = entry.arguments()
    lowered = {n: arguments[n].to(dtype) for n in entry.features}
    expected = run(entry, arguments | lowered)
    for few in ([feature], [n for n in entry.features if n != feature]):
        mixed = {n: lowered[n] if n in few else lowered[n].float() for n in entry.features}
        found = run(entry, arguments | mixed, forward=torch.autocast("cpu", dtype=dtype))
        assert [g.dtype == dtype for g in found[1:]] == [n in few for n in entry.features]
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got, wanted.to(got.dtype))
    words = f"{entry.name}: Expected all features to have the same dtype, but got ...{entry.called(feature)}.dtype: float64"
    with torch.autocast("cpu", dtype=dtype), raises(RuntimeError, words):
        entry(**{feature: arguments[feature].double()})


@pytest.mark.parametrize("name", ENTRIES)
def test_autocast_lowers_nothing(name: str) -> None:
    """float32 features keep float32 losses and gradients, also where backward is called inside: rounded products would cost digits."""
    entry = ENTRIES[name]
    expected = run(entry, entry.arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(entry, entry.arguments())
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


# Derivatives ----------------------------------------------------------------------------------------------------------------------------

FUSED = (*TABLE, "ids", "unpaired", "captions", "stats")


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("name", FUSED)
def test_derivatives_that_are_refused(name: str, backend: str) -> None:
    entry = ENTRIES[name]
    feature, plain = entry.features[0], entry.arguments() | {"backend": backend}

    def loss_of(z: Tensor) -> Tensor:
        return value_of(entry.function(**(plain | {feature: z}))).sum()

    z = plain[feature].requires_grad_()
    with raises(RuntimeError, "fastnce: the second derivative of this loss is not implemented"):
        torch.autograd.grad(loss_of(z), z, create_graph=True)[0].square().sum().backward()
    with raises(NotImplementedError, "fastnce: forward-mode derivatives (jvp) are not implemented"):
        torch.func.jvp(loss_of, (z.detach(),), (torch.ones_like(z),))


@contextlib.contextmanager
def refusal(words: str) -> Iterator[None]:
    """Code inside may raise, but only so."""
    try:
        yield
    except RuntimeError as error:
        if words not in str(error):
            raise


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("name", ENTRIES)
def test_second_backward_and_changes_in_place(name: str, backend: str) -> None:
    entry = ENTRIES[name]
    arguments = leaves_of(entry.arguments())
    loss = value_of(entry.function(**arguments, backend=backend)).sum()
    features = [arguments[feature] for feature in entry.features]
    once, again = (torch.autograd.grad(loss, features, retain_graph=retain) for retain in (True, False))
    assert all(map(torch.equal, once, again))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    for feature in features:
        loss = value_of(entry.function(**arguments, backend=backend)).sum()
        with torch.no_grad():
            feature.mul_(2)
        # Where the loss works on a copy, as of two views in one matrix, the gradient is still that of what it was given.
        with refusal("modified by an inplace operation"):
            assert all(map(torch.equal, torch.autograd.grad(loss, features), once))
        with torch.no_grad():
            feature.div_(2)


# Debug mode -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", each(BACKENDS))
@pytest.mark.parametrize("name", ENTRIES)
def test_debug_mode_changes_no_result(name: str, backend: str) -> None:
    expected = run(ENTRIES[name], ENTRIES[name].arguments(), backend)
    with fastnce.debug():
        found = run(ENTRIES[name], ENTRIES[name].arguments(), backend)
    assert all(map(torch.equal, found, expected))


BAD_ROWS = {math.nan: "contains non-finite values", -math.inf: "contains non-finite values", 0.0: "is zero", 2e18: "has a norm above 1e+18"}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_debug_mode_names_the_row(name: str, feature: str, bad: float) -> None:
    """The argument as the caller knows it, and the first of its rows that is wrong."""
    entry = ENTRIES[name]
    arguments = entry.arguments()
    arguments[feature][3:5] = bad
    place = f"{entry.called(feature)} row 3 " if arguments[feature].dim() == 2 else f"{entry.called(feature)} row ..."
    with fastnce.debug(), raises(ValueError, f"{entry.name}: {place}{BAD_ROWS[bad]}"):
        entry.function(**arguments)


@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_debug_mode_accepts_what_is_fine(name: str, feature: str) -> None:
    """Long rows in float64, which has room for their squares; rows of any length where they are not normalised."""
    entry = ENTRIES[name]
    arguments = {n: v.double() if n in entry.features else v for n, v in entry.arguments().items()}
    arguments[feature][3] *= 1e30
    with fastnce.debug():
        assert torch.isfinite(value_of(entry.function(**arguments))).all()
        arguments[feature][3] = 0.0
        assert torch.isfinite(value_of(entry.function(**arguments, normalize=False))).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: sup_con(x(6, 5), torch.arange(6)),
        lambda: sup_con(x(6, 5), mask=torch.eye(6, dtype=torch.bool)),
        lambda: info_nce(x(6, 5), x(6, 5), exclude_query_ids=same(6)),
        lambda: info_nce(x(6, 5), x(6, 5), x(7, 5), exclude_query_ids=same(6), exclude_key_ids=same(7)),
        lambda: contrastive_stats(x(6, 5), scale=1.0, q_exclude_ids=same(6)),
    ],
    ids=["labels", "mask", "in-batch", "unpaired", "stats"],
)
def test_debug_mode_complains_where_there_is_nothing_to_learn(call: Callable[[], object]) -> None:
    with fastnce.debug(), pytest.raises(ValueError, match=r"^(sup_con|info_nce|contrastive_stats): .*(labels|mask|ids)"):
        call()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENTRIES)
def test_tensors_without_values(name: str, mode: str) -> None:
    """The shape and dtype of the result come from those of the input; there is no value that debug mode could look at."""
    for on in (False, True):
        with kind(mode), fastnce.debug(on):
            found = ENTRIES[name](**({"reduction": "none"} if name in LOSSES else {}))
            vector = found if name in LOSSES else found.lse_neg
            assert vector.shape == (ENTRIES[name].rows,) and vector.dtype == torch.float32
            assert vector.is_meta == (mode == "meta")


def test_debug_mode_is_content_where_some_keys_are_left() -> None:
    """Every shared negative is excluded, the in-batch ones are not; a batch of one is no mistake either."""
    excluded = {"exclude_query_ids": torch.ones(6, dtype=torch.int64), "exclude_key_ids": torch.tensor([0] * 6 + [1, 1])}
    expected = info_nce(x(6, 5), x(6, 5, seed=1), backend="torch")
    with fastnce.debug():
        assert info_nce(x(1, 5), x(1, 5)).item() == 0.0
        found = info_nce(x(6, 5), x(6, 5, seed=1), x(2, 5, seed=2), in_batch=True, **excluded)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offsets", [(1, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 5, 5), (0, 1, 2, 3, 4, 5, 9), (0, 3, 2, 3, 4, 5, 6)], ids=str)
def test_debug_mode_checks_ragged_offsets(offsets: tuple[int, ...]) -> None:
    """They must rise from 0 to the number of values, or values would belong to the wrong query, or to none."""
    with fastnce.debug(), raises(ValueError, "info_nce: negative_keys[1] must rise from 0 to 6"):
        ENTRIES["ragged"](offsets=torch.tensor(offsets))


def complains() -> bool:
    """Whether debug mode is on."""
    try:
        contrastive_stats(torch.zeros(6, 5), scale=1.0)
    except ValueError:
        return True
    return False


def test_debug_mode_ends_with_its_block() -> None:
    before = complains()
    with fastnce.debug():
        assert complains()
        with fastnce.debug(False):
            assert not complains()
        with pytest.raises(TypeError), fastnce.debug(False):
            info_nce(None, None)
        assert complains()
    assert complains() == before


def test_debug_mode_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read once, when the package is imported."""
    with monkeypatch.context() as environment:
        for value, on in (("1", True), ("0", False), ("", False)):
            environment.setenv("FASTNCE_DEBUG", value)
            importlib.reload(arguments)
            assert complains() == on
    importlib.reload(arguments)
