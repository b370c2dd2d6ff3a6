"""EVA-CLIP backbones of open_clip with MaskCLIP dense features: the value path replaces attention in the last block."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.open_clip_base import OpenClipModel
from spar_lightning.backbones.open_clip_config import model_config
from spar_lightning.backbones.packing import patch_tokens
from spar_lightning.backbones.timm_eva import EvaTrunk
from spar_lightning.errors import UserError


class EVA02CLIP(OpenClipModel, EvaTrunk):
    """EVA01-CLIP or EVA02-CLIP vision tower of open_clip with MaskCLIP dense features.

    Args:
        model: Name of the model in open_clip, such as EVA02-B-16 or EVA02-L-14-336.
        pretrained: Pretrained tag of open_clip (downloaded once), path of a weight file or of a folder with one,
            or null for random weights.
        text_pretrained: Pretrained tag or path of the text tower, needed if `pretrained` is a student without
            one; null uses `pretrained`.
    """

    value_path = True

    def __init__(
        self,
        model: str = "EVA02-B-16",
        pretrained: str | None = "merged2b_s8b_b131k",
        text_pretrained: str | None = None,
    ) -> None:
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        if model_config(model)["vision_cfg"].get("timm_pool") != "token":
            raise UserError(f"EVA02CLIP: {model} is not an EVA-CLIP model. Use a model with EVA in its name.")
        super().__init__(model, pretrained, None, text_pretrained, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
        self.read_facts()
        self.embed_dim = self.trunk.head.out_features

    @property
    def trunk(self) -> Any:
        """Eva of timm."""
        return self.visual.trunk

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        features: Tensor = self.trunk.head(self.trunk.norm(patch_tokens(tokens, grids, self.prefix)))
        return features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {**super().parameter_groups(), "head": list(self.trunk.head.parameters())}
