"""The loss step: match -> labels -> losses of the anchors -> normalizer. A method is a part of it, and sees `Matched`."""

from .matching import IGNORED, Matched
from .step import LossStep

__all__ = ["IGNORED", "LossStep", "Matched"]
