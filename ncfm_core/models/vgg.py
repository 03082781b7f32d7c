"""VGG-11 (arXiv 1409.1556, configuration A) for small images, as DC and its successors use it."""

from __future__ import annotations

import torch.nn.functional as F

from ncfm_core.models.chain import Chain


class VGG11(Chain):
    """Eight convolutions 3x3 with norm and ReLU, five max pools 2x2, and one linear layer in place of the three of the paper.

    At width 64 the maps have 64, 128, 256, 256, 512, 512, 512 and 512 channels.
    """

    pool = staticmethod(F.max_pool2d)
