"""Checks of ids, labels and masks, the arguments that say which rows belong together, and of their absence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnce import arguments

_VIEWS_SECOND = "features is (examples, views, columns), views come second: features.transpose(0, 1)"


def id_pair(
    where: str,
    names: tuple[str, str],
    given: tuple[object, object],
    of: tuple[str, str],
    like: Tensor,
    sizes: tuple[int, int],
    paired: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Ids of queries and of keys. Where row i of one belongs to row i of the other (paired), ids of one side serve both.

    `of` are the caller's names for queries and keys, `sizes` their numbers of rows."""
    if given[0] is None and given[1] is None:
        return None, None
    if (given[0] is None or given[1] is None) and not paired:
        raise ValueError(
            f"{where}: {names[given[0] is not None]} is missing: with {sizes[0]} queries and {sizes[1]} keys both {names[0]} and "
            f"{names[1]} are needed, because row i of one does not belong to row i of the other"
        )
    first, second = (arguments.ids(where, names[i], given[i], sizes[i], like, of[i]) for i in (0, 1))
    return second if first is None else first, first if second is None else second


def labels(where: str, value: object, features: Tensor) -> Tensor | None:
    """sup_con's labels, one per example, as int64; None stays None. Each wrong shape that users give has a remedy in its message."""
    examples, views = features.shape[0], features.shape[1] if features.dim() == 3 else 1
    remedy = ""
    if isinstance(value, Tensor) and value.shape != (examples,):
        shape = tuple(value.shape)
        if value.is_floating_point() and value.dim() > 1 and shape[-1] == features.shape[-1]:
            remedy = "these look like a second view; two views are one tensor, torch.stack([a, b], dim=1)"
        elif value.dim() == 2 and shape[0] == examples and shape[1] > 1:
            # Boolean tensors have no argmax.
            remedy = f"if labels are one-hot, use labels.{'int().' if value.dtype == torch.bool else ''}argmax(1); "
            if shape[1] == examples:
                remedy += "a matrix of who belongs together is mask=labels.bool()"
            elif shape[1] == views:
                remedy += f"one label serves all {views} views, labels[:, 0]"
            else:
                remedy += "of several labels each, make mask=labels.float() @ labels.float().T > 0"
        elif value.dim() == 1 and features.dim() == 3 and shape[0] == views:
            remedy = _VIEWS_SECOND
        elif value.dim() == 1 and views > 1 and shape[0] == views * examples:
            remedy = (
                f"one label serves all {views} views: labels[:{examples}] if they lie view by view, labels[::{views}] if example by example"
            )
        elif value.dim() == 1 and features.dim() == 2 and 0 < 2 * shape[0] == examples:
            remedy = "if features is [view 0; view 1], use torch.stack(features.chunk(2), dim=1)"
    if remedy:
        raise ValueError(f"{where}: labels must have shape ({examples},) for features {tuple(features.shape)}, got {shape}; {remedy}")
    return arguments.ids(where, "labels", value, examples, features, "features", "one label per example")


def mask(
    where: str,
    name: str,
    value: object,
    like: Tensor,
    shape: tuple[int, int] | None = None,
    each: str = "one row and column per example",
) -> Tensor | None:
    """A boolean matrix of positives; None stays None. Without `shape` any matrix that is not empty will do: it is repeated.

    `each` describes its rows and columns in the message."""
    if value is None:
        return None
    x = arguments.a_tensor(where, name, value)
    if x.dtype != torch.bool:
        raise TypeError(f"{where}: {name} must have dtype torch.bool, got {x.dtype} ({name}.bool())")
    if x.dim() != 2 or (0 in x.shape and like.shape[0] > 0 if shape is None else x.shape != shape):
        wanted = "a non-empty matrix" if shape is None else f"of shape {shape}, {each}"
        remedy = f"; {_VIEWS_SECOND}" if shape is not None and like.dim() == 3 and x.shape == 2 * like.shape[1:2] else ""
        raise ValueError(f"{where}: {name} must be {wanted}, got shape {tuple(x.shape)}{remedy}")
    arguments.same_device(where, features=like, **{name: x})
    return x


def some_positive(where: str, features: Tensor, labels: Tensor | None, mask: Tensor | None) -> None:
    """Raise where no anchor of sup_con could have a positive: one view of each example, and neither labels nor mask."""
    if (features.dim() == 2 or features.shape[1] == 1) and labels is mask is None and features.shape[0] > 0:
        whole = "; where rows are [view 0; view 1], use nt_xent(features)" if features.dim() == 2 else ""
        raise ValueError(
            f"{where}: features is {tuple(features.shape)}, one view of each example, without labels or mask: no row has a positive. "
            f"Give labels or mask, or several views, torch.stack([a, b], dim=1){whole}"
        )


def alignment(
    where: str, image: Tensor, text: Tensor, aligned: bool | None, label: tuple[Tensor | None, Tensor | None], exclude: bool, by_pair: bool
) -> None:
    """Raise where clip_loss cannot have its positives as asked: by row and by ids, or, with aligned=False, by ids alone."""
    rows, columns, wrong = image.shape[0], text.shape[0], ""
    if aligned and rows != columns:
        wrong = "with aligned=True row i of one belongs to row i of the other: as many of both"
    elif aligned or (aligned is None and rows == columns):
        row = None if aligned else disagreement(*label)
        if row is not None:
            wrong = (
                f"so row {row} belongs to row {row}, but image_ids and text_ids differ there: aligned=False makes positives by ids alone, "
                "aligned=True by both"
            )
    elif label[0] is None:
        wrong = (
            "without image_ids and text_ids, row i of one belongs to row i of the other: give both of them, or as many images as texts "
            "without aligned=False"
        )
    elif exclude:
        wrong = (
            "exclude_image_ids and exclude_text_ids leave only the pair of row i and row i, and by ids alone no rows are such a pair: "
            "repeat each image for each of its texts"
        )
    elif by_pair:
        wrong = "weight and reduction='none' are of the pairs of row i and row i, and by ids alone no rows are such a pair: 'mean' or 'sum'"
    if wrong:
        raise ValueError(f"{where}: image is {tuple(image.shape)} and text is {tuple(text.shape)}; {wrong}")


def disagreement(a: Tensor | None, b: Tensor | None) -> int | None:
    """The first row at which two vectors of ids differ and neither is negative. None: there is none, or reading is not free."""
    if a is None or b is None or a is b or not (arguments.free_to_read(a) and arguments.free_to_read(b)):
        return None
    differ = (a != b) & (a >= 0) & (b >= 0)
    return int(differ.nonzero()[0]) if bool(differ.any()) else None


def with_own_labels(labels: Tensor) -> Tensor:
    """Each negative label replaced by one that no other example has.

    Any int64 may be in use. So the labels are renumbered, from 0 or 1 to at most their number, and the new ones come after."""
    ranked, order = labels.sort()
    numbers = torch.empty_like(labels).scatter(0, order, (ranked != ranked.roll(1)).cumsum(0))
    return numbers.where(labels >= 0, len(labels) + 1 + torch.arange(len(labels), device=labels.device))
