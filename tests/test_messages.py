"""Messages: the code that one tells its reader to write is right, and its words about the input are true."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from entries import ENTRIES, IDS, SEVERAL, raises, x
from torch import Tensor

import fastnce
from fastnce import clip_loss, contrastive_stats, info_nce, moco_loss, nt_xent, sup_con

A, B = x(16, 5).double(), x(16, 5, seed=3).double()
VIEWS = torch.stack([A, B], dim=1)
LABELS = torch.arange(16) % 5
ONE_HOT = F.one_hot(LABELS)
TOGETHER = LABELS[:, None] == LABELS


class Mistake(NamedTuple):
    """call(wrong) raises; its message tells to write `remedy`, where the caller has `wrong` under this name; then call gives `right`."""

    error: type[Exception]
    call: Callable[..., Tensor]
    name: str
    wrong: Any
    remedy: str
    right: Callable[[], Tensor]


def labelled(wrong: Any, remedy: str, features: Tensor = A, error: type[Exception] = ValueError) -> Mistake:
    return Mistake(error, lambda labels: sup_con(features, labels), "labels", wrong, remedy, lambda: sup_con(features, LABELS))


def of_features(call: Callable[[Tensor], Tensor], wrong: Tensor, remedy: str, right: Callable[[], Tensor]) -> Mistake:
    return Mistake(ValueError, call, "features", wrong, remedy, right)


MISTAKES: dict[str, Mistake] = {
    "one-hot": labelled(ONE_HOT, "labels.argmax(1)"),
    "one-hot, float": labelled(ONE_HOT.float(), "labels.argmax(1)", torch.cat([A, B], 1)),
    "one-hot, bool": labelled(ONE_HOT.bool(), "labels.int().argmax(1)"),
    "one-hot, as many classes as examples": labelled(F.one_hot(LABELS, 16), "labels.argmax(1)"),
    "one-hot, as many classes as views": Mistake(
        ValueError,
        lambda labels: sup_con(VIEWS, labels),
        "labels",
        F.one_hot(LABELS % 2),
        "labels.argmax(1)",
        lambda: sup_con(VIEWS, LABELS % 2),
    ),
    "several labels": Mistake(
        ValueError,
        lambda mask: sup_con(A, mask) if mask.dtype != torch.bool else sup_con(A, mask=mask),
        "labels",
        ONE_HOT | ONE_HOT.roll(1, 1),
        "labels.float() @ labels.float().T > 0",
        lambda: sup_con(A, mask=((LABELS[:, None] - LABELS).abs() % 5 <= 1) | ((LABELS[:, None] - LABELS).abs() == 4)),
    ),
    "a mask as labels": Mistake(
        ValueError,
        lambda given: sup_con(A, **{"mask" if given.dtype == torch.bool else "labels": given}),
        "labels",
        TOGETHER.int(),
        "labels.bool()",
        lambda: sup_con(A, LABELS),
    ),
    "a label for each view": labelled(torch.stack([LABELS, LABELS], 1), "labels[:, 0]", VIEWS),
    "a label for each row, view by view": labelled(LABELS.repeat(2), "labels[:16]", VIEWS),
    "a label for each row, example by example": labelled(LABELS.repeat_interleave(2), "labels[::2]", VIEWS),
    "(B, 1) labels": labelled(LABELS[:, None], "labels.reshape(-1)"),
    "(B, 1) labels of views": labelled(LABELS[:, None], "labels.reshape(-1)", VIEWS),
    "list": labelled(LABELS.tolist(), "torch.as_tensor(labels)", error=TypeError),
    "array": labelled(LABELS.numpy(), "torch.as_tensor(labels)", error=TypeError),
    "float labels": labelled(LABELS.float(), "labels.long()", error=TypeError),
    "uint64": labelled(LABELS.to(torch.uint64), "labels.to(torch.int64)", error=TypeError),
    "views first, with labels": of_features(
        lambda features: sup_con(features, LABELS), torch.stack([A, B]), "features.transpose(0, 1)", lambda: sup_con(VIEWS, LABELS)
    ),
    "views first, with a mask": of_features(
        lambda features: sup_con(features, mask=TOGETHER), torch.stack([A, B]), "features.transpose(0, 1)", lambda: sup_con(VIEWS, LABELS)
    ),
    "rows of both views, labels of one": of_features(
        lambda features: sup_con(features, LABELS),
        torch.cat([A, B]),
        "torch.stack(features.chunk(2), dim=1)",
        lambda: sup_con(VIEWS, LABELS),
    ),
    "two views as two arguments": Mistake(
        ValueError,
        lambda b: sup_con(A, b) if b.dim() == 2 else sup_con(b),
        "b",
        B,
        "torch.stack([a, b], dim=1)",
        lambda: nt_xent(A, B, temperature=0.1),
    ),
    "nothing positive, (N, D)": of_features(
        lambda given: sup_con(given) if given.dim() else given,  # nt_xent(features) is the loss itself
        torch.cat([A, B]),
        "nt_xent(features)",
        lambda: nt_xent(A, B),
    ),
    "nothing positive, (B, 1, D)": Mistake(
        ValueError, sup_con, "features", A[:, None], "torch.stack([a, b], dim=1)", lambda: nt_xent(A, B, temperature=0.1)
    ),
    "(B, 1) ids": Mistake(
        ValueError,
        lambda ids: info_nce(A, B, exclude_query_ids=ids),
        "exclude_query_ids",
        LABELS[:, None],
        "exclude_query_ids.reshape(-1)",
        lambda: info_nce(A, B, exclude_query_ids=LABELS),
    ),
    "more keys than queries, and no negatives": Mistake(
        ValueError,
        lambda k: info_nce(A[:4], k, B),
        "positive_key",
        B[:6],
        "positive_key[:4]",
        lambda: info_nce(A[:4], B[:4], B),
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_a_message_tells_to_write_is_right(case: str) -> None:
    """Found in the message, evaluated with the caller's names, and given instead."""
    error, call, name, wrong, remedy, right = MISTAKES[case]
    with pytest.raises(error) as caught:
        call(wrong)
    assert remedy in str(caught.value)
    found = call(eval(remedy, {"torch": torch, "nt_xent": nt_xent, "a": A, "b": B} | {name: wrong}))
    torch.testing.assert_close(found, right(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("views", ["all", "one"])
@pytest.mark.parametrize("features", [(16, 5), (16, 1, 5), (1, 5)], ids=str)
def test_sup_con_that_has_nothing_positive_by_its_shapes(features: tuple[int, ...], views: str) -> None:
    """One view, and neither labels nor mask: an error without looking at a value. With another view, labels or a mask it is none."""
    z = x(*features)
    for options in ({}, {"unlabelled": "own_views"}, {"no_positive": "skip"}, {"reduction": "sum"}):
        for given in (z, z.to("meta")):
            with raises(ValueError, f"sup_con: features is {features}, one view of each example, without labels or mask: ") as caught:
                sup_con(given, views=views, **options)
            assert ("nt_xent(features)" in str(caught.value)) == (len(features) == 2)
            with raises(ValueError, f"sup_con: features is {features}, one view"):
                fastnce.SupConLoss(views=views, **options)(given)
    n = len(z)
    for allowed in (sup_con(z, torch.zeros(n).long()), sup_con(z, mask=torch.ones(n, n).bool()), sup_con(VIEWS[:n], views=views)):
        assert torch.isfinite(allowed)


# A message denies nothing that is so ------------------------------------------------------------------------------------------------------

INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(("name", "vector"), [(n, v) for n, v in IDS if v != "offsets"])
def test_an_integer_is_never_said_to_be_none(name: str, vector: str, dtype: str) -> None:
    """Every integer dtype whose numbers int64 holds is taken; uint64 is refused, and named."""
    entry, kind = ENTRIES[name], getattr(torch, dtype)
    binary = {v: torch.arange(6) % 2 for v in entry.ids}
    given = binary | {vector: binary[vector].to(kind)}
    if dtype == "uint64":
        with raises(TypeError, f"{entry.name}: {vector} has dtype torch.uint64; ...int64, which holds numbers below 2^63"):
            entry(**given)
    else:
        expected, found = entry(**binary), entry(**given)
        assert torch.equal(found, expected) if isinstance(found, Tensor) else all(map(torch.equal, found[:4], expected[:4]))


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("n", [6, 5])
@pytest.mark.parametrize(("name", "vector"), IDS)
def test_a_number_is_never_said_to_be_another_than_itself(name: str, vector: str, n: int, columns: int) -> None:
    """Matrices where vectors are wanted, of the right number of rows and of another: the message is about the dimension."""
    entry = ENTRIES[name]
    rows, called = n + (vector == "offsets"), {"offsets": "negative_keys[1]"}.get(vector, vector)
    for shape in ((rows, columns), (columns, rows), (rows, 1, columns), ()):
        with raises(ValueError, f"{entry.name}: ") as caught:
            entry(**{vector: torch.zeros(shape, dtype=torch.int64)})
        message = str(caught.value)
        assert str(tuple(shape)) in message and re.search(rf"{re.escape(called)} must have shape \(\d,\)", message)
        assert all(a != b for a, b in re.findall(r"\((\d+)\) to match .*\((\d+)\)", message))
        assert vector == "labels" or "1-D, one" in message


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("name", "feature"), SEVERAL)
def test_autocast_is_advised_only_where_it_helps(name: str, feature: str, autocast: bool) -> None:
    """The remedy in a message about dtypes is right, for every combination that raises."""
    entry, given = ENTRIES[name], ENTRIES[name].arguments()
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float32, torch.float64), (torch.float64, torch.bfloat16)):
        arguments = given | {f: given[f].to(dtypes[f == feature]) for f in entry.features}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if autocast and torch.float64 not in dtypes:
                entry.function(**arguments)
                continue
            with raises(RuntimeError, f"{entry.name}: Expected all features to have the same dtype") as caught:
                entry.function(**arguments)
        message = str(caught.value)
        assert ("use autocast" in message) == (torch.float64 not in dtypes)
        if torch.float64 not in dtypes:
            with torch.autocast("cpu", torch.bfloat16):
                entry.function(**arguments)
            continue
        doubles = [f for f in entry.features if arguments[f].dtype == torch.float64]
        assert re.findall(r"([\w\[\]]+)\.float\(\)", message) == [{"values": "negative_keys[0]"}.get(f, f) for f in doubles]
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 in dtypes):
            entry.function(**(arguments | {f: arguments[f].float() for f in doubles}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_a_number_out_of_range_is_not_called_no_number(name: str, dtype: torch.dtype) -> None:
    """1e300 and 1e-310 are positive and finite: the message gives the range instead."""
    entry, given = ENTRIES[name], ENTRIES[name].arguments()
    features = {f: given[f].to(dtype) for f in entry.features}
    for number in (0.0, -1.0, math.nan, math.inf):
        with raises(ValueError, f"{entry.name}: {entry.scale} must be a positive finite number, got {number}"):
            entry(**features, **{entry.scale: number})
    largest = torch.finfo(dtype).max
    for number in (1e300, 1e-310):
        if 1 / largest <= number <= largest:
            entry(**features, **{entry.scale: number})
            continue
        with raises(ValueError, f"{entry.name}: {entry.scale} must be between ...{str(dtype)[6:]}, got {number}") as caught:
            entry(**features, **{entry.scale: number})
        low, high = re.findall(r"between (\S+) and (\S+), in", str(caught.value))[0]
        assert (low, high) == {torch.float32: ("2.9e-39", "3.4e+38"), torch.float64: ("5.6e-309", "1.8e+308")}[dtype]


@pytest.mark.parametrize("module", [False, True])
def test_labels_where_features_are_wanted_point_to_sup_con(module: bool) -> None:
    """A second argument of labels is a call of another loss: libraries for metric learning are called with (rows, labels)."""
    calls: tuple[tuple[Callable[..., Any], str], ...] = (
        (fastnce.NTXentLoss() if module else nt_xent, "nt_xent: z1"),
        (fastnce.InfoNCE() if module else info_nce, "info_nce: positive_key"),
        (fastnce.ClipLoss() if module else lambda a, b: clip_loss(a, b, 10.0), "clip_loss: text"),
        (fastnce.MoCoLoss(4, 5) if module else lambda a, b: moco_loss(a, b, x(4, 5)), "moco_loss: k"),
    )
    for call, start in calls:
        for dtype in INTEGERS[:-2]:
            for labels in (LABELS, LABELS[:, None]):
                given = labels.to(getattr(torch, dtype))
                with raises(TypeError, f"{start} has dtype {given.dtype}; features must be float32...; if these are labels, sup_con("):
                    call(A.float(), given)


def test_integers_of_numpy_are_integers() -> None:
    plain = contrastive_stats(A, B, scale=1.0, offset=1)
    assert torch.equal(contrastive_stats(A, B, scale=1.0, offset=numpy.int64(1)).pos, plain.pos)
    assert fastnce.NegativeQueue(numpy.int64(4), numpy.int32(5)).keys.shape == (4, 5)
    for wrong in (1.0, "1", True, numpy.float64(1.0)):
        with raises(TypeError, "contrastive_stats: offset must be an integer, got "):
            contrastive_stats(A, B, scale=1.0, offset=wrong)


def test_what_a_message_says_was_missing_is_missing() -> None:
    """Each with a second way in, for which one sentence for both would be wrong."""
    ids = LABELS[:6]
    for call, words in {
        lambda: contrastive_stats(A, B, scale=1.0, q_labels=LABELS): "k_labels is missing",
        lambda: contrastive_stats(A, B, scale=1.0, k_exclude_ids=LABELS): "q_exclude_ids is missing",
        lambda: info_nce(A[:6], B[:4]): "so each query needs one",
        lambda: info_nce(A[:4], B[:6], B): "the others are no negatives",
        lambda: info_nce(A[:6], B[:6], B[:6], query_ids=ids): "because row i of one does not belong to row i of the other",
        lambda: info_nce(A[:6], B[:6], B[:7], query_ids=ids, key_ids=ids): "match negative_keys batch_size (7)",
        lambda: info_nce(A[:6], B[:6], B[:7], query_ids=ids, key_ids=ids, in_batch=True): "positive_key + negative_keys batch_size (13)",
        lambda: info_nce(A, B, symmetric=True, negative_keys=B): "got 16 queries, 16 keys and negative_keys",
        lambda: info_nce(A[:4], B, symmetric=True): "got 4 queries, 16 keys and no negative_keys",
        lambda: nt_xent(A, B, weight=torch.ones(5)): "(32,), one per anchor, got (5,); one per example, (16,), is right too",
        lambda: sup_con(A, mask=TOGETHER, unlabelled="own_views"): "unlabelled='own_views' is about labels, and there is a mask",
        lambda: info_nce(A, B, key_ids=ids): "key_ids batch_size (6) to match positive_key batch_size (16)",
        lambda: clip_loss(A, B, 9.0, exclude_text_ids=ids): "exclude_text_ids batch_size (6) to match text batch_size (16)",
        lambda: clip_loss(A, B, 9.0, image_ids=ids, text_ids=LABELS): "image_ids batch_size (6) to match image batch_size (16)",
        lambda: clip_loss(A[:6], B, 9.0): "without image_ids and text_ids",
        lambda: clip_loss(A[:6], B, 9.0, image_ids=ids, text_ids=LABELS, reduction="none"): "weight and reduction='none' are",
        lambda: clip_loss(A, B, 9.0, aligned=False, image_ids=LABELS, text_ids=LABELS, weight=torch.ones(16)): "weight and reduction",
        lambda: clip_loss(
            A[:6], B, 9.0, image_ids=ids, text_ids=LABELS, exclude_image_ids=ids, exclude_text_ids=LABELS
        ): "exclude_image_ids and exclude_text_ids leave only the pair of row i and row i, and by ids alone",
        lambda: clip_loss(
            A, B, 9.0, aligned=False, image_ids=LABELS, text_ids=LABELS, exclude_image_ids=LABELS, exclude_text_ids=LABELS
        ): "exclude_image_ids and exclude_text_ids leave only the pair of row i and row i, and by ids alone",
        lambda: clip_loss(A, B, 9.0, aligned=False, image_ids=LABELS): "text_ids is missing",
        lambda: clip_loss(A, B, 9.0, aligned=False): "give both of them, or ...without aligned=False",
        lambda: clip_loss(A[:6], B, 9.0, aligned=True, image_ids=ids, text_ids=LABELS): "as many of both",
        lambda: clip_loss(A, B, 9.0, aligned="no"): "'no' is not a valid value for aligned; use one of None, True, False",
        lambda: sup_con(A, LABELS, unlabelled="own"): "'own' is not a valid value for unlabelled; use one of 'alone', 'own_views'",
    }.items():
        with raises(ValueError, f"...{words}"):
            call()


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_an_integer_beyond_any_float(value: int) -> None:
    with raises(ValueError, "nt_xent: scale must be "):
        fastnce.nt_xent(torch.ones(4, 3), scale=value)
