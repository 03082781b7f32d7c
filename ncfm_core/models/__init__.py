"""Networks: forward gives logits, features gives the flat embedding before the classifier."""

from ncfm_core.models.convnet import ConvNet, build_model

__all__ = ["ConvNet", "build_model"]
