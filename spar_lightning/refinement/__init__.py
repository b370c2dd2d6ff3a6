"""Refinement of patch-text similarities (LPOSS) and guided upsampling to pixels (AnyUp).

Neither trains anything and neither knows a backbone; both take maps of class names on the patch grid. A new
refinement is a file here and a line below, which makes its class name known to configurations.
"""

from spar_lightning.refinement.anyup import AnyUp as AnyUp
from spar_lightning.refinement.base import Refinement as Refinement
from spar_lightning.refinement.lposs import LPOSS as LPOSS
