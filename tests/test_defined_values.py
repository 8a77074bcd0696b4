"""Input that only looks bad has a defined value: empty and single rows, zeros, nan, ids that leave nothing, views, dtypes, derivatives.

Values that only the device knows raise in debug mode alone; test_bad_input.py has the errors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entries import BACKENDS, ENTRIES, FEATURES, HALVES, IDS, SEVERAL, gradients, ids, leaves_of, near, raises, run, same, value_of, x
from named import each, widest
from torch import Tensor

import fastnce
from fastnce import (
    contrastive_stats,
    info_nce,
    moco_loss,
    nt_xent,
    sup_con,
)
from train_ref.truth import LOSSES as TABLE
from train_ref.truth import losses

pytestmark = pytest.mark.usefixtures("debug_mode_off")


# What has a value -----------------------------------------------------------------------------------------------------------------------


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
