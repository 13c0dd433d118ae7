"""Images and boxes: COCO-format folders, Pascal VOC, the built-in `trees` and `shapes`, the stream of training samples."""

from ..data.annotations import Id, as_coco, id_order, load_annotations, numbered
from ..data.coco import CocoDataset, Target, match_categories
from ..data.downloads import BUILT_IN, open_data, prepare_backbone_weights, shapes, trees
from ..data.errors import DataError
from ..data.findings import Finding
from ..data.images import read_image
from ..data.layouts import IMAGE_SUFFIXES, find_split, list_files, splits
from ..data.stream import CROWD, TrainingStream, collate, mix, random_crop
from ..data.voc import convert_voc, read_voc, voc_to_coco, write_conversion

__all__ = [
    "BUILT_IN",
    "CROWD",
    "IMAGE_SUFFIXES",
    "CocoDataset",
    "DataError",
    "Finding",
    "Id",
    "Target",
    "TrainingStream",
    "as_coco",
    "collate",
    "convert_voc",
    "find_split",
    "id_order",
    "list_files",
    "load_annotations",
    "match_categories",
    "mix",
    "numbered",
    "open_data",
    "prepare_backbone_weights",
    "random_crop",
    "read_image",
    "read_voc",
    "shapes",
    "splits",
    "trees",
    "voc_to_coco",
    "write_conversion",
]
