"""AlexNet for small images, as DC and its successors (arXiv 2006.05929) use it to judge a set on another architecture."""

from __future__ import annotations

import torch.nn.functional as F

from ncfm_core.models.chain import Chain


class AlexNet(Chain):
    """Two convolutions 5x5 and three 3x3 at stride 1, max pool 2x2 after the first, second and last; one linear layer.

    At width 64 the maps have 128, 192, 256, 192 and 192 channels. Norms are none in the papers, batch in their `BN` variant.
    """

    pool = staticmethod(F.max_pool2d)
