"""Refinement of patch-text similarities (LPOSS) and guided upsampling to pixels (AnyUp).

Both work without training and for any backbone, on the similarity maps of class names on the patch grid. To add a
refinement, add a module to this package and import its class below. Configurations can then use the class name.
"""

from spar_lightning.refinement.anyup import AnyUp as AnyUp
from spar_lightning.refinement.base import Refinement as Refinement
from spar_lightning.refinement.lposs import LPOSS as LPOSS
