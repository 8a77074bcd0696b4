"""Debug mode warns of legal input that looks like a mistake: with numbers and a remedy, once for each line, and it changes nothing."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from entries import ENTRIES, LOSSES, x
from torch import Tensor

import fastnce
from fastnce import clip_loss, contrastive_stats, dcl_loss, info_nce, moco_loss, nt_xent, sup_con

A, B, QUEUE = x(16, 5), x(16, 5, seed=3), x(7, 5, seed=5)
VIEWS = torch.stack([A, B], dim=1)
IDS = torch.arange(16) // 2
HALF = torch.where(torch.arange(16) < 8, IDS, -1)  # the second half has no label
HASHES = torch.arange(16) * 6364136223846793 - torch.where(torch.arange(16) % 2 == 0, 2**63 - 1, 0)
TOGETHER = IDS[:, None] == IDS


pytestmark = pytest.mark.usefixtures("debug_mode_off")


def warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of a call in debug mode, and its warnings."""
    with warnings.catch_warnings(record=True) as caught, fastnce.debug():
        warnings.simplefilter("always")
        found = call()
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    return found, [str(w.message) for w in caught]


class Suspect(NamedTuple):
    """A call, the words of its warning (... is anything), and the call that the warning recommends, which has none."""

    call: Callable[[], Any]
    words: str
    better: Callable[[], Any]


def temperature(call: Callable[..., Any], given: object) -> Suspect:
    return Suspect(
        lambda: call(temperature=given), "temperature is 20, which looks like a scale; ...give scale=20", lambda: call(scale=20.0)
    )


def scale(call: Callable[..., Any], given: object) -> Suspect:
    return Suspect(
        lambda: call(scale=given), "scale is 0.07, which looks like a temperature; ...scale=1 / 0.07", lambda: call(scale=1 / 0.07)
    )


TEMPERED: dict[str, Callable[..., Any]] = {
    "info_nce": lambda **t: info_nce(A, B, **t),
    "nt_xent": lambda **t: nt_xent(A, B, **t),
    "dcl_loss": lambda **t: dcl_loss(A, B, **t),
    "sup_con": lambda **t: sup_con(VIEWS, IDS, **t),
    "moco_loss": lambda **t: moco_loss(A, B, QUEUE, **t),
    "info_nce: module": lambda **t: fastnce.InfoNCE(**t)(A, B),
    "nt_xent: module": lambda **t: fastnce.NTXentLoss(**t)(A, B),
    "dcl_loss: module": lambda **t: fastnce.DCLLoss(**t)(A, B),
    "sup_con: module": lambda **t: fastnce.SupConLoss(**t)(VIEWS, IDS),
    "moco_loss: module": lambda **t: fastnce.MoCoLoss(7, 5, **t)(A, B),
}


def hashes(call: Callable[..., Any], name: str) -> Suspect:
    words = f"8 of 16 {name} are negative, and a negative id matches nothing: {name} & (2**63 - 1) makes"
    return Suspect(lambda: call(HASHES), words, lambda: call(HASHES & (2**63 - 1)))


SUSPECTS: dict[str, Suspect] = {
    **{f"{name}, temperature 20": temperature(call, 20.0) for name, call in TEMPERED.items()},
    **{f"{name}, temperature tensor 20": temperature(call, torch.tensor([20.0])) for name, call in TEMPERED.items()},
    **{f"{name}, scale 0.07": scale(call, 0.07) for name, call in TEMPERED.items()},
    "contrastive_stats, scale 0.07": scale(lambda **t: contrastive_stats(A, B, offset=0, **t), 0.07),
    "info_nce, scale tensor 0.07": scale(TEMPERED["info_nce"], torch.tensor(0.07)),
    **{
        f"clip_loss, logit_scale {number} {kind}": Suspect(
            lambda call=call, number=number: call(number),
            "logit_scale is ..., which looks like its logarithm, or...logit_scale.exp(), or 1 / temperature",
            lambda call=call, better=better: call(better),
        )
        for kind, call in {
            "": lambda s: clip_loss(A, B, s),
            "tensor": lambda s: clip_loss(A, B, torch.tensor([s], requires_grad=True)),
            "captions": lambda s: clip_loss(A, B, s, image_ids=IDS),
            "module": lambda s: fastnce.ClipLoss()(A, B, s),
        }.items()
        for number, better in ((math.log(1 / 0.07), 1 / 0.07), (math.log(100.0), 100.0), (0.07, 1 / 0.07))
    },
    "info_nce, query_ids": hashes(lambda ids: info_nce(A, B, query_ids=ids), "query_ids"),
    "info_nce, exclude_key_ids": hashes(lambda ids: info_nce(A, B, exclude_key_ids=ids), "exclude_key_ids"),
    "clip_loss, text_ids": hashes(lambda ids: clip_loss(A, B, 9.0, text_ids=ids), "text_ids"),
    "clip_loss, exclude_image_ids": hashes(lambda ids: clip_loss(A, B, 9.0, exclude_image_ids=ids), "exclude_image_ids"),
    "sup_con, labels": hashes(lambda ids: sup_con(A, torch.where(ids < 0, ids, IDS // 2), no_positive="skip"), "labels"),
    "contrastive_stats, q_exclude_ids": hashes(lambda ids: contrastive_stats(A, scale=9.0, offset=8, q_exclude_ids=ids), "q_exclude_ids"),
    "all ids negative": Suspect(
        lambda: info_nce(A, B, exclude_query_ids=torch.full((16,), -1)),
        "16 of 16 exclude_query_ids are negative, and a negative id matches nothing",
        lambda: info_nce(A, B),
    ),
    "half the labels": Suspect(
        lambda: sup_con(VIEWS, HALF),
        "16 of 32 anchors have no positive and count 0: ...unlabelled='own_views'",
        lambda: sup_con(VIEWS, HALF, unlabelled="own_views"),
    ),
    "half the labels, skipped": Suspect(
        lambda: sup_con(VIEWS, HALF, no_positive="skip"),
        "16 of 32 anchors have no positive and are left out: ...unlabelled='own_views'",
        lambda: sup_con(VIEWS, HALF, unlabelled="own_views"),
    ),
    "half the labels, module, one view an anchor": Suspect(
        lambda: fastnce.SupConLoss(views="one")(VIEWS, HALF),
        "8 of 16 anchors have no positive and count 0: ...unlabelled='own_views'",
        lambda: fastnce.SupConLoss(views="one", unlabelled="own_views")(VIEWS, HALF),
    ),
    "a mask without its diagonal": Suspect(
        lambda: sup_con(VIEWS, mask=TOGETHER & (IDS < 6) & ~torch.eye(16, dtype=torch.bool)),
        "8 of 32 anchors have no positive and count 0: ...mask.fill_diagonal_(True)",
        lambda: sup_con(VIEWS, mask=(TOGETHER & (IDS < 6) & ~torch.eye(16, dtype=torch.bool)).fill_diagonal_(True)),
    ),
    "labels that occur once": Suspect(
        lambda: sup_con(A, torch.arange(16).clamp(max=12)),
        "12 of 16 anchors have no positive and count 0; no_positive='skip' leaves them out of the mean",
        lambda: sup_con(A, torch.arange(16).clamp(max=12), no_positive="skip"),
    ),
    "texts that belong to no image": Suspect(
        lambda: clip_loss(A[:6], B, 9.0, image_ids=torch.arange(6), text_ids=IDS),
        "4 of 16 texts have no positive and count 0: no image has their id",
        lambda: clip_loss(A[:8], B, 9.0, image_ids=torch.arange(8), text_ids=IDS),
    ),
    "views first": Suspect(
        lambda: sup_con(torch.stack([A, B])),
        "features is (2, 16, 5), which is 2 examples of 16 views each; views come second: features.transpose(0, 1)",
        lambda: sup_con(VIEWS),
    ),
    "statistics of negatives alone": Suspect(
        lambda: contrastive_stats(A, B, scale=9.0),
        "16 of 16 rows have no positive: pos is 0 there and lse_pos -inf; offset, labels or positive_mask say which",
        lambda: contrastive_stats(A, B, scale=9.0, offset=0),
    ),
    "statistics beyond the keys": Suspect(
        lambda: contrastive_stats(A, B, scale=9.0, offset=13),
        "13 of 16 rows have no positive: pos is 0 there and lse_pos -inf",
        lambda: contrastive_stats(A, B, scale=9.0, offset=0),
    ),
    "ids that deny a pair": Suspect(
        lambda: info_nce(A, B, query_ids=IDS, key_ids=IDS.flip(0)),
        "query_ids and key_ids differ at row 0, whose query and key are positives by their place",
        lambda: info_nce(A, B.flip(0), query_ids=IDS, key_ids=IDS),
    ),
}


@pytest.mark.parametrize("case", SUSPECTS)
def test_what_looks_like_a_mistake(case: str) -> None:
    """One warning, at the line of the caller; none outside of debug mode; the same bits; and what it recommends is quiet."""
    call, words, better = SUSPECTS[case]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = call()
    torch.manual_seed(0)
    found, said = warned(call)
    assert len(said) == 1
    assert re.match(r"\w+: " + ".*".join(map(re.escape, words.split("..."))), said[0])
    for a, b in zip(*(f if isinstance(f, tuple) else (f,) for f in (found, expected)), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert warned(better)[1] == []


@pytest.mark.parametrize("name", [*LOSSES, "README", "SigLIP", "no labels at all"])
def test_what_looks_right_is_quiet(name: str) -> None:
    """Ordinary calls of every loss, at usual temperatures and beside their limits, with ids of -1, and rows that are not normalised."""
    if name in LOSSES:
        entry, given = ENTRIES[name], ENTRIES[name].arguments()
        for number in (0.01, 0.07, 0.5, 1.0, 5.0) if entry.scale == "temperature" else (5.0, 14.3, 100.0):
            assert warned(lambda number=number: entry.function(**(given | {entry.scale: number})))[1] == []
            if entry.scale == "temperature":
                assert warned(lambda number=number: entry.function(**given, scale=1 / number))[1] == []
        far = {entry.scale: 30.0 if entry.scale == "temperature" else 0.1, "normalize": False}
        assert warned(lambda: entry.function(**(given | far)))[1] == []
        for ids in ([3, -1, 3, -1, 4, 4], [2**63 - 1, 5, 2**63 - 1, -1, 5, 5]):
            some = {v: torch.tensor(ids) for v in entry.ids if v != "offsets"}
            assert [m for m in warned(lambda some=some: entry.function(**(given | some)))[1] if "anchors" not in m] == []
    elif name == "README":
        for module in (fastnce.InfoNCE(), fastnce.NTXentLoss(), fastnce.ClipLoss(), fastnce.MoCoLoss(7, 5)):
            assert warned(lambda module=module: module(A, B))[1] == []
        assert warned(lambda: sup_con(VIEWS, torch.where(IDS < 3, -1, IDS), unlabelled="own_views"))[1] == []
        assert warned(lambda: sup_con(torch.stack([A, B]), torch.tensor([0, 1])))[1] == []
    elif name == "SigLIP":
        assert warned(lambda: clip_loss(A, B, 10.0, -10.0))[1] == []
    else:
        assert warned(lambda: sup_con(VIEWS, torch.full((16,), -1), unlabelled="own_views"))[1] == []


def test_once_for_each_line_that_calls() -> None:
    """By Python's own rules, though the numbers in the text change from batch to batch: filters decide, and a new filter starts anew."""
    module = fastnce.SupConLoss()
    labels = [torch.where(torch.arange(16) < n, IDS, -1) for n in (8, 10, 12)]
    with fastnce.debug():
        for action, expected in (("default", 2), ("always", 6), ("ignore", 0), ("default", 2)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter(action)
                for some in labels:
                    module(VIEWS, some)
                    module(VIEWS, some)
            assert len(caught) == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="16 of 32 anchors have no positive"):
                module(VIEWS, labels[0])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for some in labels:  # two kinds of doubt on one line
                sup_con(VIEWS, some, temperature=20.0)
        assert sorted("anchors" in str(w.message) for w in caught) == [False, True]


@pytest.mark.parametrize("name", ["info_nce", "clip_loss", "sup_con"])
def test_compiled_code_is_one_graph_in_debug_mode(name: str) -> None:
    """Nothing is read and nothing said where there are no values yet."""
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "info_nce": lambda a, b: info_nce(a, b, temperature=20.0, exclude_query_ids=IDS - 3),
        "clip_loss": lambda a, b: clip_loss(a, b, 2.66, image_ids=IDS - 3, exclude_text_ids=IDS),
        "sup_con": lambda a, b: sup_con(torch.stack([a, b], 1), HALF, unlabelled="own_views"),
    }
    expected = calls[name](A, B)
    with fastnce.debug(), warnings.catch_warnings(record=True) as caught:
        found = torch.compile(calls[name], backend="aot_eager", fullgraph=True)(A, B)
    torch.testing.assert_close(found, expected)
    assert not [w for w in caught if "fastnce" in str(w.message) or name in str(w.message)]


def test_nothing_is_said_of_tensors_without_values() -> None:
    z, ids = A.to("meta"), HASHES.to("meta")
    assert warned(lambda: info_nce(z, z, query_ids=ids))[1] == []
    assert warned(lambda: sup_con(torch.stack([z, z], 1), ids))[1] == []
    assert warned(lambda: torch.func.vmap(lambda z: info_nce(z, z, exclude_query_ids=HASHES))(VIEWS.transpose(0, 1)))[1] == []
