"""What may follow the cosines: scores spread over similar patches (LPOSS), maps brought to pixels by the image (AnyUp).

Neither trains anything and neither knows a backbone; both take maps of class names on the patch grid.
"""

from spar_lightning.refine.anyup import BILINEAR as BILINEAR
from spar_lightning.refine.anyup import AnyUp as AnyUp
from spar_lightning.refine.anyup import check_weights as check_weights
from spar_lightning.refine.lposs import LPOSS as LPOSS
from spar_lightning.refine.lposs import REFINEMENTS as REFINEMENTS
from spar_lightning.refine.lposs import Refinement as Refinement
