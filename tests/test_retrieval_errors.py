"""fastnce.retrieval: what it refuses, and what debug mode says of it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from entries import BACKENDS, MODES, ids, kind, raises, x
from named import each, widest
from test_bad_input import FEATURE_MISTAKES, LAYOUT_MISTAKES
from test_debug_errors import BAD_ROWS
from test_retrieval import IDS, LABELS, A, B, same
from torch import Tensor

import fastnce
from fastnce import RetrievalStats, retrieval
from fastnce.backends import torch_tiles

SEARCHES: dict[str, Callable[..., RetrievalStats]] = {
    "two sets": lambda **o: retrieval(**{"query": x(6, 5), "key": x(6, 5, seed=1)} | rules(IDS) | o),
    "one set": lambda **o: retrieval(**{"query": x(6, 5)} | rules(IDS[::2]) | o),
}


def rules(names: tuple[str, ...]) -> dict[str, Tensor]:
    """Two queries are about one thing, and of every third row there is a copy that does not count."""
    return {name: ids(6) if name in IDS[:2] else torch.arange(6) % 3 for name in names}


FEATURES = [("two sets", "query"), ("two sets", "key"), ("one set", "query")]
VECTORS = [("two sets", name) for name in IDS] + [("one set", name) for name in IDS[::2]]


# Errors --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", FEATURE_MISTAKES)
@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_features(name: str, feature: str, mistake: str) -> None:
    spoil, error, words = FEATURE_MISTAKES[mistake]
    for mode in MODES:
        with kind(mode), raises(error, f"retrieval: {words.format(feature)}"):
            SEARCHES[name](**{feature: spoil(x(6, 5))})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mistake", LAYOUT_MISTAKES)
@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_layouts_that_are_not_dense(name: str, feature: str, mistake: str) -> None:
    spoil, layout = LAYOUT_MISTAKES[mistake]
    with raises(NotImplementedError, f"retrieval: {feature} is a ...{layout} tensor...pass a dense"):
        SEARCHES[name](**{feature: spoil(x(6, 5))})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature", ["query", "key"])
def test_features_that_do_not_fit(feature: str, mode: str) -> None:
    with kind(mode):
        with raises(ValueError, "retrieval: query is (6, ...) and key is (6, ...); expected the same feature size, got "):
            SEARCHES["two sets"](**{feature: x(6, 4)})
        with raises(RuntimeError, f"retrieval: Expected all features to have the same dtype, but got ...{feature}.dtype: float64"):
            SEARCHES["two sets"](**{feature: x(6, 5).double()})


@pytest.mark.parametrize(("name", "argument"), [*FEATURES[:2], *VECTORS, ("two sets", "positive_mask"), ("one set", "positive_mask")])
def test_another_device(name: str, argument: str) -> None:
    given = {"query": x(6, 5), "key": x(6, 5), "positive_mask": torch.ones(6, 6, dtype=torch.bool)}.get(argument, ids(6))
    with raises(RuntimeError, "retrieval: Expected all tensors to be on the same device, but found at least two devices, ") as caught:
        SEARCHES[name](**{argument: given.to("meta")})
    assert re.search(rf"[ (]{argument} on (meta|cpu)", str(caught.value))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "vector"), VECTORS)
def test_ids(name: str, vector: str, mode: str) -> None:
    with kind(mode):
        for wrong in (torch.float32, torch.complex64):
            with raises(TypeError, f"retrieval: {vector} must have an integer dtype, got {wrong} ({vector}.long())"):
                SEARCHES[name](**{vector: ids(6).to(wrong)})
        with raises(TypeError, f"retrieval: argument '{vector}' must be Tensor, not list"):
            SEARCHES[name](**{vector: [0] * 6})
        with raises(ValueError, f"retrieval: Expected {vector} batch_size (4) to match ...batch_size (6); {vector} must have "):
            SEARCHES[name](**{vector: ids(4)})
        with raises(ValueError, f"retrieval: ...{vector} must have shape (6,), got (6, 1); use {vector}.reshape(-1)"):
            SEARCHES[name](**{vector: ids(6)[:, None]})


@pytest.mark.parametrize("given", IDS)
def test_ids_of_one_side_only(given: str) -> None:
    """They serve both sides where row i of one belongs to row i of the other, and only there."""
    place = IDS.index(given)
    rows, partner = (4, 6)[place % 2], IDS[place ^ 1]
    with raises(ValueError, f"retrieval: {partner} is missing: with 4 queries and 6 keys both ...are needed"):
        retrieval(x(4, 5), x(6, 5), **{given: ids(rows)})
    with raises(ValueError, f"retrieval: {partner} is missing"):
        retrieval(x(6, 5), x(6, 5), offset=1, **{given: ids(6)})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SEARCHES)
def test_masks(name: str, mode: str) -> None:
    with kind(mode):
        with raises(TypeError, "retrieval: argument 'positive_mask' must be Tensor, not list"):
            SEARCHES[name](positive_mask=[True])
        with raises(TypeError, "retrieval: positive_mask must have dtype torch.bool, got torch.float32 (positive_mask.bool())"):
            SEARCHES[name](positive_mask=torch.ones(6, 6))
        for shape in ((6,), (6, 0), (6, 5), (3, 3)):
            with raises(ValueError, "retrieval: positive_mask must be of shape (6, 6), one row per query and one column per key, got"):
                SEARCHES[name](positive_mask=torch.ones(shape, dtype=torch.bool))


VALUE_ERRORS: dict[str, Callable[[], object]] = {
    "retrieval: key is (0, 5); at least one key is needed": lambda: retrieval(x(6, 5), x(0, 5)),
    "retrieval: query is (6, 5) and key is (4, 5); row i of key is the positive of query i, so each": lambda: retrieval(x(6, 5), x(4, 5)),
    "retrieval: query is (6, 5) and key is (6, 5); exclude_self leaves out key i": lambda: retrieval(x(6, 5), x(6, 5), exclude_self=True),
    "retrieval: without key, give query_ids, positive_mask or offset: two views ...offset=len(query) // 2": lambda: retrieval(x(6, 5)),
    "retrieval: two_sided needs key": lambda: SEARCHES["one set"](two_sided=True),
    "retrieval: key_ids and exclude_key_ids need key": lambda: SEARCHES["one set"](key_ids=ids(6)),
    "retrieval: key_ids and exclude_key_ids need key; ...": lambda: SEARCHES["one set"](exclude_key_ids=ids(6)),
    "retrieval: offset is 0; ...must be at least 1": lambda: retrieval(x(6, 5), offset=0),
    "retrieval: positive_mask and offset together need key": lambda: retrieval(
        x(6, 5), offset=3, positive_mask=torch.ones(6, 6, dtype=torch.bool)
    ),
    "retrieval: offset is 2147483648; ...from -(2^31 - 1) to 2^31 - 1": lambda: SEARCHES["two sets"](offset=2**31),
    "retrieval: 'tritn' is not a valid value for backend; use 'auto' or one of ": lambda: SEARCHES["two sets"](backend="tritn"),
    "retrieval: 'tritn' is not a valid value for backend; ...": lambda: SEARCHES["two sets"](backend="tritn", hardest=3),
    "retrieval: every number in ks must be a positive integer, got 0": lambda: SEARCHES["two sets"](ks=(1, 0)),
    "retrieval: every number in ks must be a positive integer, got 2.5": lambda: SEARCHES["two sets"](ks=[2.5]),
    "retrieval: every number in ks must be a positive integer, got True": lambda: SEARCHES["two sets"](ks=[True]),
    **{
        f"retrieval: hardest must be a positive integer, got {wrong!r}": lambda wrong=wrong: SEARCHES["two sets"](hardest=wrong)
        for wrong in (0, -1, 2.0, True, None)
    },
}
TYPE_ERRORS: dict[str, Callable[[], object]] = {
    "retrieval: ks must be a sequence of positive integers, got 5; ...ks=(5,)": lambda: SEARCHES["two sets"](ks=5),
    "retrieval: ks must be a sequence of positive integers, got '15'": lambda: SEARCHES["two sets"](ks="15"),
    "retrieval: offset must be an integer, got float 1.5": lambda: SEARCHES["two sets"](offset=1.5),
    **{
        f"retrieval: {option} must be True or False, got {type(wrong).__name__} {wrong!r}": lambda option=option, wrong=wrong: SEARCHES[
            "two sets"
        ](**{option: wrong})
        for option in ("normalize", "two_sided", "exclude_self")
        for wrong in ("yes", 1)
    },
}


@pytest.mark.parametrize(("error", "words"), [(ValueError, w) for w in VALUE_ERRORS] + [(TypeError, w) for w in TYPE_ERRORS])
def test_message(error: type[Exception], words: str) -> None:
    for mode in MODES:
        with kind(mode), raises(error, words):
            (VALUE_ERRORS if error is ValueError else TYPE_ERRORS)[words]()


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tiles, "unsupported", lambda problem: ["rows too wide"])
    for count in (1, 3):
        with raises(NotImplementedError, f"retrieval: no backend for ...\n  {torch_tiles.NAME}: rows too wide"):
            SEARCHES["two sets"](backend=torch_tiles.NAME, hardest=count)


# Debug mode -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", BAD_ROWS)
@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_debug_mode_names_the_row(name: str, feature: str, wrong: float) -> None:
    given = x(6, 5)
    given[3:5] = wrong
    with fastnce.debug(), raises(ValueError, f"retrieval: {feature} row 3 {BAD_ROWS[wrong]}"):
        SEARCHES[name](**{feature: given})


@pytest.mark.parametrize("backend", each(BACKENDS))
def test_debug_mode_changes_no_result_and_warns(backend: str) -> None:
    a, b = A.to(widest(backend)), B.to(widest(backend))
    expected = SEARCHES["two sets"](hardest=2, backend=backend)
    with fastnce.debug():
        same(SEARCHES["two sets"](hardest=2, backend=backend), expected)
        with raises(ValueError, "retrieval: no row has any key: the ids, labels or mask exclude every pair"):
            retrieval(a, query_ids=LABELS, exclude_query_ids=LABELS * 0, backend=backend)
        for words, call in {
            "9 of 16 queries have no positive: they are no hits, and add 0 to mrr": {
                "query_ids": torch.where(LABELS < 2, LABELS, -1),
                "key_ids": LABELS,
            },
            "2 of 16 key_ids are negative, and a negative id matches nothing": {
                "query_ids": LABELS,
                "key_ids": LABELS.index_fill(0, torch.arange(2), -5),
                "offset": 0,
            },
            "query_ids and key_ids differ at row 0, whose query and key are positives": {
                "query_ids": LABELS,
                "key_ids": LABELS + 1,
                "offset": 0,
            },
        }.items():
            with pytest.warns(UserWarning, match=f"^retrieval: {re.escape(words)}") as caught:
                retrieval(a, b, **call, backend=backend)
            assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize(("queries", "keys"), [(16, 9), (9, 16)])
def test_debug_mode_compares_the_ids_of_partners(queries: int, keys: int) -> None:
    """Also where one side has more rows."""
    labels, other = LABELS[:queries], LABELS[:keys].index_fill(0, torch.tensor(3), 77)
    with fastnce.debug(), pytest.warns(UserWarning, match="retrieval: query_ids and key_ids differ at row 3"):
        retrieval(A[:queries], B[:keys], offset=0, query_ids=labels, key_ids=other)
