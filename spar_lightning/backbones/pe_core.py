"""Perception Encoder (PE-Core) backbones of open_clip: ViTs with RoPE and attention pooling.

Dense features apply the value path of the pooling to each token, as for SigLIP2, and then the projection into the text
embedding space. The published model was trained for whole images only.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.open_clip_base import OpenClipModel
from spar_lightning.backbones.open_clip_config import model_config
from spar_lightning.backbones.packing import patch_tokens
from spar_lightning.backbones.siglip2 import pool_parameters, pooled_values
from spar_lightning.backbones.timm_eva import EvaTrunk
from spar_lightning.errors import UserError


class PECore(OpenClipModel, EvaTrunk):
    """PE-Core vision tower of open_clip with dense features from the value path of its pooling.

    Args:
        model: Name of the model in open_clip, such as PE-Core-B-16 or PE-Core-L-14-336.
        pretrained: Pretrained tag of open_clip (downloaded once), path of a weight file or of a folder with one,
            or null for random weights.
        text_pretrained: Pretrained tag or path of the text tower, needed if `pretrained` is a student without
            one; null uses `pretrained`.
    """

    def __init__(
        self, model: str = "PE-Core-B-16", pretrained: str | None = "meta", text_pretrained: str | None = None
    ) -> None:
        if not model.startswith("PE-Core"):
            raise UserError(f"PECore: {model} is not a Perception Encoder. Use a model with PE-Core in its name.")
        model_config(model)  # raises for an unknown model
        half = (0.5, 0.5, 0.5)
        super().__init__(model, pretrained, None, text_pretrained, mean=half, std=half)
        self.read_facts()
        self.embed_dim = self.trunk.head.out_features

    @property
    def trunk(self) -> Any:
        """Eva of timm."""
        return self.visual.trunk

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        trunk = self.trunk
        values = pooled_values(trunk.attn_pool, trunk.norm(patch_tokens(tokens, grids, self.prefix)))
        features: Tensor = trunk.head(trunk.fc_norm(values))
        return features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        head = [*pool_parameters(self.trunk.attn_pool), *self.trunk.head.parameters()]
        return {**super().parameter_groups(), "head": head}
