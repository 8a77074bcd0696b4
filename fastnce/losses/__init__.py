"""The losses: check the input, say which pairs are what, ask for the statistics, apply a formula, reduce.

queries.py has those of queries that meet keys, views.py those of rows that meet each other.
"""

from fastnce.losses.queries import clip_loss, info_nce, moco_loss
from fastnce.losses.views import dcl_loss, nt_xent, sup_con

__all__ = ["clip_loss", "dcl_loss", "info_nce", "moco_loss", "nt_xent", "sup_con"]
