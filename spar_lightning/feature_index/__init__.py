"""Index of images: their dense features, computed once, and then queried with any class names.

The folder is a feature cache with other content: the features of the network that `spar predict` would run, the size of
each image, and a small JPEG of it for pictures. A query runs the text encoder only.
"""

from spar_lightning.feature_index.build import Origin, WritableIndex
from spar_lightning.feature_index.query import FeatureIndex, ranking

__all__ = ["FeatureIndex", "Origin", "WritableIndex", "ranking"]
