"""Fused losses for contrastive learning: exact, without ever storing the matrix of similarities."""

from fastnce._version import __version__
from fastnce.arguments import debug
from fastnce.logit_scale import LogitScale
from fastnce.losses import clip_loss, dcl_loss, info_nce, moco_loss, nt_xent, sup_con
from fastnce.moco_module import MoCoLoss
from fastnce.modules import ClipLoss, DCLLoss, InfoNCE, NTXentLoss, SupConLoss
from fastnce.queue import NegativeQueue
from fastnce.retrieval import RetrievalStats, retrieval
from fastnce.statistics import ContrastiveStats, contrastive_stats, merge

__all__ = [
    "ClipLoss",
    "ContrastiveStats",
    "DCLLoss",
    "InfoNCE",
    "LogitScale",
    "MoCoLoss",
    "NTXentLoss",
    "NegativeQueue",
    "RetrievalStats",
    "SupConLoss",
    "__version__",
    "clip_loss",
    "contrastive_stats",
    "dcl_loss",
    "debug",
    "info_nce",
    "merge",
    "moco_loss",
    "nt_xent",
    "retrieval",
    "sup_con",
]
