"""Debug mode raises where only the device knows that a value is wrong, names the argument and its row, and changes no result."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from entries import BACKENDS, ENTRIES, FEATURES, LOSSES, MODES, kind, raises, run, same, value_of, x
from named import each

import fastnce
from fastnce import arguments, contrastive_stats, info_nce, sup_con

pytestmark = pytest.mark.usefixtures("debug_mode_off")


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
