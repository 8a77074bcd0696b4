"""nn.Module twins of the losses: they hold the options that stay the same from step to step, and call losses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastnce import arguments, losses
from fastnce.formulas import Reduction
from fastnce.logit_scale import LogitScale
from fastnce.loss_module import Loss
from fastnce.negatives import Ragged


class InfoNCE(Loss):
    """info_nce as a module: a query has to find its own key among all the keys it meets.

    Args:
        temperature: a float, an nn.Parameter (learned) or another tensor (a buffer). Default: 0.1. It and scale can be read and set.
        scale: 1 / temperature, instead of temperature. It may be a LogitScale, which becomes the submodule `logit_scale`.
        reduction, negative_mode, normalize, in_batch, symmetric, backend: as in info_nce.

    Raises:
        TypeError, ValueError: an option that info_nce does not take, when the module is made; temperature and scale at once.

    Example:
        >>> loss = fastnce.InfoNCE(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7437)
        >>> loss.scale
        1.0

    van den Oord et al. 2018 (arXiv:1807.03748), eq. 4.
    """

    _function = staticmethod(losses.info_nce)

    @arguments.without_return_stats
    def __init__(
        self,
        temperature: float | Tensor | None = None,
        reduction: Reduction = "mean",
        negative_mode: Literal["unpaired", "paired"] = "unpaired",
        *,
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        in_batch: bool | None = None,
        symmetric: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            negative_mode=negative_mode,
            scale=scale,
            normalize=normalize,
            in_batch=in_batch,
            symmetric=symmetric,
            backend=backend,
        )

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | Ragged | None = None,
        *,
        weight: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        exclude_query_ids: Tensor | None = None,
        exclude_key_ids: Tensor | None = None,
    ) -> Tensor:
        """info_nce of these features, with the options of this module. The ways of giving negatives and ids are described there.

        Args:
            query, positive_key: (M, D) and (N, D), N >= M: row i is the positive of query i.
            negative_keys: (K, D) shared, (M, K, D) paired, or ragged, a tuple (values (T, D), offsets (M + 1,)). Default: none.
            weight: (M,) floating-point weights of the queries. Default: all equal.
            query_ids, key_ids: integers, (M,) and one for each key met. Equal ids make a positive.
            exclude_query_ids, exclude_key_ids: integers, (M,) and one for each key met. Equal ids leave a pair out.

        Returns:
            A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (M,).
        """
        return losses.info_nce(
            query,
            positive_key,
            negative_keys,
            weight=weight,
            query_ids=query_ids,
            key_ids=key_ids,
            exclude_query_ids=exclude_query_ids,
            exclude_key_ids=exclude_key_ids,
            **self._given(),
        )


class NTXentLoss(Loss):
    """nt_xent as a module: SimCLR's loss of two views of a batch.

    Args:
        temperature: a float, an nn.Parameter (learned) or another tensor (a buffer). Default: 0.5. It and scale can be read and set.
        scale: 1 / temperature, instead of temperature. It may be a LogitScale, which becomes the submodule `logit_scale`.
        reduction, normalize, backend: as in nt_xent.

    Raises:
        TypeError, ValueError: an option that nt_xent does not take, when the module is made; temperature and scale at once.

    Example:
        >>> loss = fastnce.NTXentLoss(temperature=1.0)
        >>> loss(torch.eye(4)[:2], torch.eye(4)[2:])
        tensor(1.0986)

    Chen et al. 2020 (arXiv:2002.05709), eq. 1.
    """

    _function = staticmethod(losses.nt_xent)

    @arguments.without_return_stats
    def __init__(
        self,
        temperature: float | Tensor | None = None,
        reduction: Reduction = "mean",
        *,
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, scale=scale, normalize=normalize, backend=backend)

    def forward(self, z0: Tensor, z1: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """nt_xent of two views, with the options of this module.

        Args:
            z0, z1: (B, D) two views, row i of one the positive of row i of the other; or z0 alone, (2B, D), one after the other.
            weight: floating-point weights, (2B,) one per row or (B,) one per example. Default: all equal.

        Returns:
            A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (2B,), rows of z0 first.
        """
        return losses.nt_xent(z0, z1, weight=weight, **self._given())


class DCLLoss(Loss):
    """dcl_loss as a module: NT-Xent whose denominator leaves the positive out.

    Args:
        temperature: a float, an nn.Parameter (learned) or another tensor (a buffer). Default: 0.1. It and scale can be read and set.
        scale: 1 / temperature, instead of temperature. It may be a LogitScale, which becomes the submodule `logit_scale`.
        reduction, normalize, backend: as in dcl_loss.

    Raises:
        TypeError, ValueError: an option that dcl_loss does not take, when the module is made; temperature and scale at once.

    Example:
        >>> loss = fastnce.DCLLoss(temperature=1.0)
        >>> loss(torch.eye(4)[:2], torch.eye(4)[2:])
        tensor(0.6931)

    Yeh et al. 2021 (arXiv:2110.06848), eq. 6, without weights of positives.
    """

    _function = staticmethod(losses.dcl_loss)

    @arguments.without_return_stats
    def __init__(
        self,
        temperature: float | Tensor | None = None,
        reduction: Reduction = "mean",
        *,
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, scale=scale, normalize=normalize, backend=backend)

    def forward(self, z0: Tensor, z1: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """dcl_loss of two views, with the options of this module.

        Args:
            z0, z1: (B, D) two views, row i of one the positive of row i of the other; or z0 alone, (2B, D), one after the other.
            weight: floating-point weights, (2B,) one per row or (B,) one per example. Default: all equal.

        Returns:
            A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (2B,), rows of z0 first.
        """
        return losses.dcl_loss(z0, z1, weight=weight, **self._given())


class SupConLoss(Loss):
    """sup_con as a module: positives by label or mask.

    Args:
        temperature: a float, an nn.Parameter (learned) or another tensor (a buffer). Default: 0.1. It and scale can be read and set.
        scale: 1 / temperature, instead of temperature. It may be a LogitScale, which becomes the submodule `logit_scale`.
        variant, views, reduction, no_positive, unlabelled, normalize, backend: as in sup_con.

    Raises:
        TypeError, ValueError: an option that sup_con does not take, when the module is made; temperature and scale at once.

    Example:
        >>> loss = fastnce.SupConLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)

    Khosla et al. 2020 (arXiv:2004.11362), eq. 2 and 3.
    """

    _function = staticmethod(losses.sup_con)

    @arguments.without_return_stats
    def __init__(
        self,
        temperature: float | Tensor | None = None,
        variant: Literal["out", "in"] = "out",
        views: Literal["all", "one"] = "all",
        reduction: Reduction = "mean",
        *,
        no_positive: Literal["zero", "skip", "error"] = "zero",
        unlabelled: Literal["alone", "own_views"] = "alone",
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            variant=variant,
            views=views,
            reduction=reduction,
            no_positive=no_positive,
            unlabelled=unlabelled,
            scale=scale,
            normalize=normalize,
            backend=backend,
        )

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """sup_con of these features, with the options of this module.

        Args:
            features: (B, V, D), V views of B examples, or (N, D), one view of each.
            labels, mask: integers, one per example, equal ones positives; or bool (B, B) or (N, N), mask[i, j]: j is a positive of i.
            weight: floating-point weights, one per anchor or (B,) one per example. Default: all equal.

        Returns:
            A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", one value per anchor.
        """
        return losses.sup_con(features, labels, mask, weight=weight, **self._given())


class ClipLoss(Loss):
    """clip_loss as a module, which learns its logit scale: put its parameters into the optimizer, without weight decay.

    Args:
        init_scale: where the module's own LogitScale, `logit_scale`, begins. Default: 1 / 0.07.
        max_scale: its upper limit; None: no limit.
        scale: instead of these two, the model's LogitScale, a parameter or another tensor, already exponentiated; or a float: it is fixed,
            and the module owns no parameter. `loss.scale` can be read and set.
        reduction, normalize, backend: as in clip_loss.

    Raises:
        TypeError, ValueError: an option that clip_loss does not take, when the module is made; scale beside init_scale or max_scale.

    Example:
        >>> loss = fastnce.ClipLoss(init_scale=1.0)
        >>> round(loss(torch.eye(4), torch.eye(4)).item(), 4)
        0.7437
        >>> loss.scale.item()
        1.0

    Radford et al. 2021 (arXiv:2103.00020), figure 3.
    """

    _function = staticmethod(losses.clip_loss)

    @arguments.without_return_stats
    def __init__(
        self,
        init_scale: float | None = None,
        max_scale: float | None = 100.0,
        reduction: Reduction = "mean",
        *,
        scale: float | Tensor | LogitScale | None = None,
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        if scale is None:
            scale = LogitScale(1 / 0.07 if init_scale is None else init_scale, max_scale)
        elif init_scale is not None or max_scale != 100.0:
            raise ValueError("ClipLoss: give scale, or init_scale and max_scale, not both (scale=LogitScale(init, max))")
        super().__init__(scale=scale, reduction=reduction, normalize=normalize, backend=backend)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        exclude_image_ids: Tensor | None = None,
        exclude_text_ids: Tensor | None = None,
        aligned: bool | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """clip_loss of these features, with the options of this module.

        Args:
            image, text: (N, D) features, row i with row i unless aligned=False; (M, D) and (N, D) where ids say which rows belong together.
            logit_scale: in place of the module's, whose gradient is then 0: DistributedDataParallel finds it used, weight decay moves it.
            logit_bias: a float or a one-element tensor, added to every logit. Default: none.
            image_ids, text_ids: integers (M,), (N,). Equal ids make a positive.
            exclude_image_ids, exclude_text_ids: integers (M,), (N,). Equal ids leave a pair out.
            aligned: whether row i belongs to row i. Default: where there are as many images as texts.
            weight: (N,) floating-point weights of the pairs. Default: all equal.

        Returns:
            A 0-dim float32 tensor (float64 for float64 features) in nats; with reduction="none", (N,).
        """
        own = self.scale
        loss = losses.clip_loss(
            image,
            text,
            own if logit_scale is None else logit_scale,
            logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            exclude_image_ids=exclude_image_ids,
            exclude_text_ids=exclude_text_ids,
            aligned=aligned,
            weight=weight,
            **{name: value for name, value in self.options.items() if name not in ("temperature", "scale")},
        )
        if logit_scale is None or not isinstance(own, Tensor):
            return loss
        # The sum of no elements is 0, and so is its gradient, whatever the scale is.
        return loss + own.reshape(1)[:0].sum().to(loss.dtype)
