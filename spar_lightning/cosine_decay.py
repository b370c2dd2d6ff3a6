"""CosineDecay: learning rate schedule for a run whose length may change when it is resumed."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from spar_lightning.errors import UserError


class CosineDecay(LambdaLR):
    """Cosine decay of the learning rate to zero at the end of the run, in closed form: a resumed run may end elsewhere.

    Args:
        optimizer: Wrapped optimizer.
        total_steps: Number of optimizer steps of the run.
        warm_up: Fraction of the steps in which the rate also rises linearly: the first steps of Adam are large.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warm_up: float = 0.0) -> None:
        if not 0 <= warm_up < 1:
            raise UserError(f"warm_up must be at least 0 and below 1, but got {warm_up}.")

        def factor(step: int) -> float:
            rise = min((step + 1) / max(warm_up * total_steps, 1), 1)
            return rise * 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1)))

        super().__init__(optimizer, factor)
