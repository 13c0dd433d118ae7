"""Images and boxes: COCO-format folders, Pascal VOC, the built-in `trees`, the stream of training samples."""

from models.data.coco import CocoDataset, Target, as_coco, find_split, load_annotations
from models.data.downloads import open_data, prepare_backbone_weights, trees
from models.data.errors import DataError
from models.data.images import read_image
from models.data.stream import CROWD, TrainingStream, collate, mix, random_crop
from models.data.voc import convert_voc

__all__ = [
    "CROWD",
    "CocoDataset",
    "DataError",
    "Target",
    "TrainingStream",
    "as_coco",
    "collate",
    "convert_voc",
    "find_split",
    "load_annotations",
    "mix",
    "open_data",
    "prepare_backbone_weights",
    "random_crop",
    "read_image",
    "trees",
]
