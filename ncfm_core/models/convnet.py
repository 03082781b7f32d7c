"""The ConvNet of the distillation literature (Dynamic few-shot visual learning, arXiv 1804.09458; as used by DC, DM and NCFM)."""

from __future__ import annotations

import torch.nn.functional as F

from ncfm_core.models.chain import Chain


class ConvNet(Chain):
    """Blocks of [conv 3x3, norm, ReLU, average pool 2x2], then one linear layer."""

    pool = staticmethod(F.avg_pool2d)
