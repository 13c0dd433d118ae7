"""CUDA and C++ kernels for the parts of dense object detection that are not convolutions."""

from focalops._version import __version__
from focalops.anchors import AnchorGenerator
from focalops.focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_star

__all__ = ["AnchorGenerator", "__version__", "sigmoid_focal_loss", "sigmoid_focal_loss_star"]
