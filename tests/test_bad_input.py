"""Bad input: the errors, with their types and words; test_defined_values.py has the input that has a defined result instead.

Types, shapes, dtypes, devices and Python numbers are known to the host, and raise always. Values that only the device knows have a defined
result, and raise in debug mode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from entries import CLIP_IDS, ENTRIES, FEATURES, IDS, LOSSES, MODES, NCE_IDS, SEVERAL, ids, kind, raises, x
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnce
from fastnce import (
    LogitScale,
    NegativeQueue,
    clip_loss,
    contrastive_stats,
    dcl_loss,
    info_nce,
    moco_loss,
    nt_xent,
    sup_con,
)
from fastnce.backends import torch_tiles

pytestmark = pytest.mark.usefixtures("debug_mode_off")


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
