"""Every loss against its definition, written as Python loops over pairs in float64: values, and gradients by torch's autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from named import IN_FLOAT64
from torch import Tensor

import fastnce

BACKENDS = ("auto", *IN_FLOAT64)


def features(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g, dtype=torch.float64) + 0.1
    return torch.randn(*shape, generator=g, dtype=torch.float64) * lengths


def cos(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=0) @ F.normalize(b, dim=0)


def lse(values: list[Tensor]) -> Tensor:
    return torch.stack(values).logsumexp(0)


def same(found: Callable[[], Tensor], defined: Callable[[], Tensor], *inputs: Tensor) -> None:
    """Equal values, and equal gradients of a random projection of them."""
    leaves = [x.requires_grad_() for x in inputs]
    a, b = found(), defined()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for x, y in zip(torch.autograd.grad(a, leaves, weights), torch.autograd.grad(b, leaves, weights), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("keys", [9, 14])
def test_info_nce_in_batch(backend: str, reduction: str, keys: int) -> None:
    q, k, t = features(9, 5), features(keys, 5, seed=1), torch.tensor(0.3, dtype=torch.float64)

    def defined() -> Tensor:
        rows = [lse([cos(q[i], k[j]) / t for j in range(keys)]) - cos(q[i], k[i]) / t for i in range(9)]
        return reduce(torch.stack(rows), reduction)

    same(lambda: fastnce.info_nce(q, k, temperature=t, reduction=reduction, backend=backend), defined, q, k, t)


def reduce(rows: Tensor, reduction: str) -> Tensor:
    return {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_batch", [None, True, False])
@pytest.mark.parametrize("kind", ["unpaired", "paired", "ragged"])
def test_info_nce_explicit_negatives(backend: str, in_batch: bool | None, kind: str) -> None:
    q, k, scale = features(6, 5), features(6, 5, seed=1), torch.tensor(4.0, dtype=torch.float64)
    offsets = [0, 3, 3, 4, 9, 11, 11]
    negatives = {"unpaired": features(8, 5, seed=2), "paired": features(6, 4, 5, seed=2), "ragged": features(11, 5, seed=2)}[kind]

    def own(i: int) -> list[Tensor]:
        rows = negatives if kind == "unpaired" else negatives[i] if kind == "paired" else negatives[offsets[i] : offsets[i + 1]]
        return list(rows)

    def defined() -> Tensor:
        rows = []
        for i in range(6):
            candidates = [k[i]] + (own(i) if in_batch is not True else own(i) + [k[j] for j in range(6) if j != i])
            rows.append(lse([scale * cos(q[i], c) for c in candidates]) - scale * cos(q[i], k[i]))
        return torch.stack(rows)

    given = (negatives, torch.tensor(offsets)) if kind == "ragged" else negatives

    def found() -> Tensor:
        mode = "paired" if kind == "paired" else "unpaired"
        return fastnce.info_nce(q, k, given, scale=scale, reduction="none", negative_mode=mode, in_batch=in_batch, backend=backend)

    same(found, defined, q, k, negatives, scale)


EMPTY: dict[str, tuple[tuple[int, ...], str]] = {
    "unpaired": ((0, 5), "unpaired"),
    "paired": ((6, 0, 5), "paired"),
    "ragged": ((0, 5), "unpaired"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", EMPTY)
def test_no_negatives_beside_the_batch(kind: str, backend: str) -> None:
    """A batch that happens to have none of its own is the in-batch loss, bit for bit, with its ids; the empty tensor gets
    a gradient of its shape. Without in-batch keys there is nothing to compare with: ValueError."""
    q, k, (shape, mode) = features(6, 5), features(6, 5, seed=1), EMPTY[kind]
    ids = torch.tensor([0, 1, 2, 0, 4, 4])
    for options in ({}, {"reduction": "none"}, {"exclude_query_ids": ids, "exclude_key_ids": ids}, {"symmetric": True}):
        none = torch.empty(shape, dtype=torch.float64, requires_grad=True)
        given = (none, torch.zeros(7, dtype=torch.int64)) if kind == "ragged" else none
        call = {"temperature": 0.2, "backend": backend, **options}
        leaf = q.detach().requires_grad_()
        found = fastnce.info_nce(leaf, k, given, negative_mode=mode, in_batch=True, **call)
        expected = fastnce.info_nce(q.detach(), k, **call)
        assert torch.equal(found.detach(), expected.detach())
        dq, dnone = torch.autograd.grad(found.sum(), (leaf, none))
        assert dq.any() and dnone.shape == shape
        for in_batch in (None, False):
            with pytest.raises(ValueError, match="at least one key is needed; with in_batch=True there may be none"):
                fastnce.info_nce(q, k, given, negative_mode=mode, in_batch=in_batch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_info_nce_ids(backend: str) -> None:
    """query_ids make more positives (mean over them), exclude ids drop negatives but never the own pair; over in-batch and shared keys."""
    q, k, shared = features(7, 5), features(7, 5, seed=1), features(5, 5, seed=2)
    q_id, k_id = torch.tensor([0, 1, 2, 0, 4, -1, 6]), torch.tensor([0, 1, 2, 0, 4, -1, 6, 0, 1, -1, 9, 4])
    q_no, k_no = torch.tensor([5, 5, 1, 2, 3, 4, -1]), torch.tensor([5, 5, 1, 2, 3, 4, -1, 1, -1, 3, 3, 5])
    keys = lambda j: k[j] if j < 7 else shared[j - 7]  # noqa: E731

    def defined() -> Tensor:
        rows = []
        for i in range(7):
            kept = [j for j in range(12) if j == i or q_no[i] < 0 or q_no[i] != k_no[j]]
            positive = [j for j in kept if j == i or (q_id[i] >= 0 and q_id[i] == k_id[j])]
            s = {j: cos(q[i], keys(j)) / 0.2 for j in kept}
            rows.append(lse(list(s.values())) - torch.stack([s[j] for j in positive]).mean())
        return torch.stack(rows)

    ids = {"query_ids": q_id, "key_ids": k_id, "exclude_query_ids": q_no, "exclude_key_ids": k_no}
    same(lambda: fastnce.info_nce(q, k, shared, 0.2, "none", in_batch=True, backend=backend, **ids), defined, q, k, shared)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_one", [True, False])
def test_nt_xent(backend: str, as_one: bool) -> None:
    a, b, t = features(8, 5), features(8, 5, seed=1), torch.tensor([0.4], dtype=torch.float64)

    def defined() -> Tensor:
        z = torch.cat([a, b])
        rows = [lse([cos(z[i], z[j]) / t[0] for j in range(16) if j != i]) - cos(z[i], z[(i + 8) % 16]) / t[0] for i in range(16)]
        return torch.stack(rows).mean()

    same(lambda: fastnce.nt_xent(*((torch.cat([a, b]), None) if as_one else (a, b)), t, backend=backend), defined, a, b, t)


@pytest.mark.parametrize("backend", IN_FLOAT64)
@pytest.mark.parametrize("no_positive", ["zero", "skip"])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("views", ["all", "one"])
@pytest.mark.parametrize("kind", ["labels", "mask", "neither", "one view"])
def test_sup_con(kind: str, views: str, variant: str, no_positive: str, backend: str) -> None:
    n_views, examples = (1 if kind == "one view" else 3), 6
    x = features(examples, n_views, 5) if n_views > 1 else features(examples, 5)
    labels = torch.tensor([0, 0, 1, 2, -1, 1])
    mask = torch.rand(examples, examples, generator=torch.Generator().manual_seed(3)) < 0.4

    def together(i: int, j: int) -> bool:
        if kind == "neither":
            return i == j
        return bool(mask[i, j]) if kind == "mask" else int(labels[i]) >= 0 and int(labels[i]) == int(labels[j])

    def defined() -> Tensor:
        flat = [(e, x[e, v] if n_views > 1 else x[e]) for v in range(n_views) for e in range(examples)]
        rows, counted = [], []
        for i, (example, anchor) in enumerate(flat[: examples if views == "one" else len(flat)]):
            others = [j for j in range(len(flat)) if j != i]
            s = {j: cos(anchor, flat[j][1]) / 0.1 for j in others}
            positive = [s[j] for j in others if together(example, flat[j][0])]
            counted.append(bool(positive))
            if not positive:
                rows.append(torch.zeros((), dtype=torch.float64))
            elif variant == "out":
                rows.append(lse(list(s.values())) - torch.stack(positive).mean())
            else:
                rows.append(lse(list(s.values())) - lse(positive) + torch.tensor(float(len(positive)), dtype=torch.float64).log())
        return torch.stack(rows).sum() / (sum(counted) if no_positive == "skip" else len(rows))

    given = {"labels": labels} if kind in ("labels", "one view") else {"mask": mask} if kind == "mask" else {}
    options = {"variant": variant, "views": views, "no_positive": no_positive, "backend": backend}
    same(lambda: fastnce.sup_con(x, **given, **options), defined, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("views", ["all", "one"])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_sup_con_whose_unlabelled_examples_keep_their_views(n_views: int, variant: str, views: str, backend: str) -> None:
    """A negative label, of any value, belongs to no other example: it is as good as a label of its own, or as mask[i, i]."""
    x, options = features(8, n_views, 5), {"variant": variant, "views": views, "reduction": "none", "backend": backend}
    labels = torch.tensor([2**63 - 1, -1, 0, -1, 2**63 - 1, -(2**63), 0, -100])
    alone = torch.tensor([8, 101, 0, 103, 8, 105, 0, 107])
    found = lambda: fastnce.sup_con(x, labels, unlabelled="own_views", **options)  # noqa: E731
    same(found, lambda: fastnce.sup_con(x, alone, **options), x)
    same(found, lambda: fastnce.sup_con(x, mask=alone[:, None] == alone, **options), x)
    module = fastnce.SupConLoss(unlabelled="own_views", **options)
    same(lambda: module(x, labels), lambda: fastnce.sup_con(x, alone, **options), x)
    # As many different labels as there is room for: none of them may become that of the unlabelled example.
    crowded = lambda: fastnce.sup_con(x, torch.arange(-1, 7), unlabelled="own_views", **options)  # noqa: E731
    same(crowded, lambda: fastnce.sup_con(x, torch.arange(8), **options), x)
    kept = found().view(-1, 8)
    assert kept[:, labels < 0].any() == (n_views > 1)
    torch.testing.assert_close(kept[:, labels >= 0], fastnce.sup_con(x, labels, **options).view(-1, 8)[:, labels >= 0])
    # None of them labelled: as without labels; all of them: as if the option were not there.
    if n_views > 1:
        none = fastnce.sup_con(x, torch.full((8,), -1), unlabelled="own_views", **options)
        torch.testing.assert_close(none, fastnce.sup_con(x, unlabelled="own_views", **options), rtol=0, atol=0)
    same(lambda: fastnce.sup_con(x, alone % 7, unlabelled="own_views", **options), lambda: fastnce.sup_con(x, alone % 7, **options), x)
    assert fastnce.sup_con(x[:0], labels[:0], unlabelled="own_views", **options).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("captions", [None, "square", "more"])
def test_clip(backend: str, captions: str | None) -> None:
    n = 11 if captions == "more" else 7
    a, b = features(7, 5), features(n, 5, seed=1)
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    image_ids = None if captions is None else torch.tensor([0, 1, 2, 3, 4, 0, 6])
    text_ids = None if captions is None else torch.tensor([0, 1, 2, 3, 4, 0, 6, 6, 2, 2, 1][:n])

    def together(i: int, j: int) -> bool:
        return i == j if captions is None else int(image_ids[i]) == int(text_ids[j])

    def direction(m: int, n: int, s: Callable[[int, int], Tensor], positive: Callable[[int, int], bool]) -> Tensor:
        rows = []
        for i in range(m):
            row = [s(i, j) for j in range(n)]
            rows.append(lse(row) - torch.stack([row[j] for j in range(n) if positive(i, j)]).mean())
        return torch.stack(rows).mean()

    def defined() -> Tensor:
        def s(i: int, j: int) -> Tensor:
            return scale * cos(a[i], b[j]) + bias

        to_text = direction(7, n, s, together)
        return (to_text + direction(n, 7, lambda j, i: s(i, j), lambda j, i: together(i, j))) / 2

    def found() -> Tensor:
        return fastnce.clip_loss(a, b, scale, bias, image_ids=image_ids, text_ids=text_ids, backend=backend)

    same(found, defined, a, b, scale)
    # The bias cancels in a softmax: its gradient is 0, up to rounding.
    bias.requires_grad_()
    assert torch.autograd.grad(found(), bias)[0].abs() < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", ["both", "image", "text", "both, and captions"])
def test_clip_exclusion(given: str, backend: str) -> None:
    """Pairs with equal exclude ids are candidates of neither direction; the own pair stays, whatever its ids. One side serves both."""
    n, a, b, scale = 9, features(9, 5), features(9, 5, seed=1), torch.tensor(3.0, dtype=torch.float64)
    one, other = torch.tensor([0, 0, 0, 1, 1, -1, -1, 4, 5]), torch.tensor([0, 2, 0, 1, 1, -1, 4, 4, 3])
    captions = torch.tensor([7, 8, 7, 9, -1, -1, 8, 8, 3])
    image_no, text_no = {"image": (one, one), "text": (other, other)}.get(given, (one, other))
    options = {} if given == "text" else {"exclude_image_ids": one}
    options |= {} if given == "image" else {"exclude_text_ids": other}
    options |= {"image_ids": captions} if "captions" in given else {}

    def value(s: Callable[[int, int], Tensor], i: int, ids: tuple[Tensor, Tensor]) -> Tensor:
        kept = [j for j in range(n) if j == i or ids[0][i] < 0 or ids[0][i] != ids[1][j]]
        positive = [j for j in kept if j == i or ("captions" in given and captions[i] >= 0 and captions[i] == captions[j])]
        return lse([s(i, j) for j in kept]) - torch.stack([s(i, j) for j in positive]).mean()

    def defined() -> Tensor:
        to_text = [value(lambda i, j: scale * cos(a[i], b[j]), i, (image_no, text_no)) for i in range(n)]
        to_image = [value(lambda j, i: scale * cos(a[i], b[j]), j, (text_no, image_no)) for j in range(n)]
        return (torch.stack(to_text) + torch.stack(to_image)) / 2

    same(lambda: fastnce.clip_loss(a, b, scale, reduction="none", backend=backend, **options), defined, a, b, scale)
    clip = fastnce.ClipLoss(reduction="none", backend=backend)
    torch.testing.assert_close(clip(a, b, scale, **options), defined(), rtol=1e-12, atol=1e-12)
    if given == "image":
        same(
            lambda: fastnce.clip_loss(a, b, scale, backend=backend, exclude_image_ids=one),
            lambda: fastnce.info_nce(a, b, scale=scale, exclude_query_ids=one, symmetric=True, backend=backend),
            a,
            b,
            scale,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_of_images_that_are_copied_for_their_captions(backend: str) -> None:
    """A limit of image_ids: copies stay in the denominators, and exclude_image_ids takes them out. By hand, for a batch of two images
    of which one is there twice: its copies have similarity 1 with each other's captions, as their own."""
    image, s = torch.eye(2, dtype=torch.float64)[[0, 0, 1]], 2.0
    ids, e = torch.tensor([0, 0, 1]), torch.tensor(s, dtype=torch.float64).exp()
    copied = (2 * (2 * e + 1).log() + (e + 2).log()) / 3 - s  # every pair stays, with ids too
    left_out = (2 * (e + 1).log() + (e + 2).log()) / 3 - s
    for options, expected in (({}, copied), ({"image_ids": ids}, copied), ({"exclude_image_ids": ids}, left_out)):
        torch.testing.assert_close(fastnce.clip_loss(image, image, s, backend=backend, **options), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clip_of_shuffled_texts(reduction: str, backend: str) -> None:
    """By ids alone the order of the texts does not matter, nor whether there happen to be as many as images."""
    a, b, scale = features(6, 5), features(6, 5, seed=1), torch.tensor(3.0, dtype=torch.float64)
    image_ids, text_ids = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 1, 2, 3, 4, 0])
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    options = {"reduction": reduction, "backend": backend}
    in_order = lambda: fastnce.clip_loss(a, b, scale, image_ids=image_ids, text_ids=text_ids, **options)  # noqa: E731
    shuffled = {"image_ids": image_ids, "text_ids": text_ids[order]}
    same(lambda: fastnce.clip_loss(a, b[order], scale, aligned=False, **shuffled, **options), in_order, a, b, scale)
    same(lambda: fastnce.ClipLoss(**options)(a, b[order], scale, aligned=False, **shuffled), in_order, a, b, scale)
    # One text more: positives are by ids alone without asking for it.
    more = torch.cat([b[order], b[:1]]), torch.cat([shuffled["text_ids"], image_ids[:1]])
    again = torch.cat([b, b[:1]]), torch.cat([text_ids, image_ids[:1]])
    torch.testing.assert_close(
        *(fastnce.clip_loss(a, text, scale, image_ids=image_ids, text_ids=i, **options) for text, i in (more, again)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_whose_ids_contradict_the_rows(backend: str) -> None:
    """An error where values can be read: ids of both sides, neither negative, that differ on one row. aligned=True asks for both."""
    a, b = features(6, 5), features(6, 5, seed=1)
    ids, wrong = torch.tensor([0, 1, 2, 3, -1, 0]), torch.tensor([0, 1, -1, 5, 4, 0])
    for options in ({}, {"weight": torch.ones(6).double()}, {"reduction": "none"}, {"exclude_image_ids": ids}):
        with pytest.raises(
            ValueError, match=r"^clip_loss: image is \(6, 5\) and text is \(6, 5\); so row 3 .* image_ids and text_ids differ"
        ):
            fastnce.clip_loss(a, b, 9.0, image_ids=ids, text_ids=wrong, backend=backend, **options)
    for options in ({"image_ids": ids}, {"text_ids": wrong}, {"image_ids": ids, "text_ids": wrong.where(wrong != 5, -1)}):
        assert torch.isfinite(fastnce.clip_loss(a, b, 9.0, backend=backend, **options))
    z = torch.zeros(6, 5, device="meta")
    assert fastnce.clip_loss(z, z, 9.0, image_ids=ids.to("meta"), text_ids=wrong.to("meta"), backend=backend).shape == ()

    def defined() -> Tensor:
        def direction(s: Callable[[int, int], Tensor], mine: Tensor, its: Tensor) -> Tensor:
            rows = []
            for i in range(6):
                positive = [s(i, j) for j in range(6) if j == i or (mine[i] >= 0 and mine[i] == its[j])]
                rows.append(lse([s(i, j) for j in range(6)]) - torch.stack(positive).mean())
            return torch.stack(rows).mean()

        to_text = direction(lambda i, j: 9.0 * cos(a[i], b[j]), ids, wrong)
        return (to_text + direction(lambda j, i: 9.0 * cos(a[i], b[j]), wrong, ids)) / 2

    same(lambda: fastnce.clip_loss(a, b, 9.0, image_ids=ids, text_ids=wrong, aligned=True, backend=backend), defined, a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_symmetric_info_nce_is_clip(backend: str) -> None:
    a, b = features(7, 5), features(7, 5, seed=1)
    same(lambda: fastnce.info_nce(a, b, temperature=0.25, symmetric=True, backend=backend), lambda: fastnce.clip_loss(a, b, 4.0), a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_queue", [True, False])
def test_moco(backend: str, as_queue: bool) -> None:
    q, k, queue = features(6, 5), features(6, 5, seed=1), fastnce.NegativeQueue(9, 5, dtype=torch.float64)

    def defined() -> Tensor:
        rows = []
        for i in range(6):
            pos = cos(q[i], k[i]) / 0.07
            rows.append(lse([pos] + [cos(q[i], n) / 0.07 for n in queue.keys]) - pos)
        return torch.stack(rows).mean()

    same(lambda: fastnce.moco_loss(q, k, queue if as_queue else queue.keys, backend=backend), defined, q, k)


def test_weights_are_a_weighted_mean() -> None:
    q, k, w = features(9, 5), features(9, 5, seed=1), torch.rand(9, dtype=torch.float64)
    rows = fastnce.info_nce(q, k, reduction="none")
    torch.testing.assert_close(fastnce.info_nce(q, k, weight=w), (rows * w).sum() / w.sum())
    torch.testing.assert_close(fastnce.info_nce(q, k, weight=w, reduction="sum"), (rows * w).sum())
    torch.testing.assert_close(fastnce.info_nce(q, k, weight=w, reduction="none"), rows * w)
    twice = fastnce.nt_xent(q, k, weight=w)
    torch.testing.assert_close(twice, fastnce.nt_xent(q, k, weight=torch.cat([w, w])))
    assert fastnce.info_nce(q, k, weight=torch.zeros(9, dtype=torch.float64)) == 0


@pytest.mark.parametrize("n", [4, 130, 700])
def test_landmarks(n: int) -> None:
    """Values that need no second implementation: equal embeddings give log of the number of candidates, one pair alone gives 0."""
    same_rows = torch.ones(n, 8)
    torch.testing.assert_close(fastnce.info_nce(same_rows, same_rows), torch.tensor(float(n)).log())
    torch.testing.assert_close(fastnce.nt_xent(same_rows), torch.tensor(float(n - 1)).log())
    torch.testing.assert_close(fastnce.clip_loss(same_rows, same_rows, 10.0), torch.tensor(float(n)).log())
    torch.testing.assert_close(fastnce.sup_con(same_rows, torch.zeros(n, dtype=torch.long)), torch.tensor(float(n - 1)).log())
    assert fastnce.info_nce(torch.randn(1, 8), torch.randn(1, 8)) == 0


@pytest.mark.parametrize("n", [60, 256, 448, 512])
def test_small_problems_agree_with_the_tiles(n: int) -> None:
    """The dense shortcut of small problems and the tiles give the same numbers, and it steps aside for solved, broken and zero rows."""
    z, w = features(n, 32).float().requires_grad_(), features(n, 32, seed=1).float().requires_grad_()
    losses = (
        lambda b: fastnce.nt_xent(z, backend=b),
        lambda b: fastnce.info_nce(z, w, backend=b),
        lambda b: fastnce.clip_loss(z, w, 9.0, backend=b),
    )
    for loss in losses:
        a, b = loss("auto"), loss("torch")
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        (ga,), (gb,) = torch.autograd.grad(a, z), torch.autograd.grad(b, z)
        assert (ga - gb).norm() <= 2e-6 * gb.norm()
    near, scale = (z.detach() + 0.05 * w.detach()), torch.tensor(50.0, requires_grad=True)
    for loss in (
        lambda b: fastnce.info_nce(z, near, scale=scale, backend=b),
        lambda b: fastnce.nt_xent(z, near, scale=scale, backend=b),
        lambda b: fastnce.clip_loss(z, near, scale, backend=b),
    ):
        solved, exact = loss("auto"), loss("torch")
        assert 0 < exact < 0.02
        torch.testing.assert_close(solved, exact, rtol=2e-5, atol=0)
        grads = [torch.autograd.grad(value, (z, scale)) for value in (solved, exact)]
        for ga, gb in zip(*grads, strict=True):
            assert (ga - gb).norm() <= 1e-4 * gb.norm()
    with torch.no_grad():
        z[3] = 0.0
    (grad,) = torch.autograd.grad(fastnce.nt_xent(z), z)
    assert torch.equal(grad[3], torch.zeros(32))
    assert torch.isfinite(grad).all()
