"""SigLIP2 and SigLIP backbones of open_clip: timm ViTs with attention pooling into the text embedding space.

Dense features apply the value path of the pooling to each token: v = out_proj(W_v x), then v + MLP(LN(v))
(paper, section 3). The query and the keys of the pooling are not used.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.open_clip_base import OpenClipModel
from spar_lightning.backbones.open_clip_config import model_config
from spar_lightning.backbones.timm_vit import TimmTrunk
from spar_lightning.errors import UserError
from spar_lightning.image.resize import pad


class SigLIP2(OpenClipModel, TimmTrunk):
    """SigLIP or SigLIP2 vision tower of open_clip with dense features from the value path of its pooling.

    Args:
        model: Name of the model in open_clip, such as ViT-B-16-SigLIP2-512 or ViT-SO400M-14-SigLIP2-378.
        pretrained: Pretrained tag of open_clip (downloaded once), path of a weight file or of a folder with one,
            or null for random weights.
        tokenizer: Folder with the tokenizer files, for use without network access; null downloads them from the
            Hugging Face Hub.
        text_pretrained: Pretrained tag or path of the text tower, needed if `pretrained` is a student without
            one; null uses `pretrained`.
    """

    paper_patch_fit = staticmethod(pad)

    def __init__(
        self,
        model: str = "ViT-B-16-SigLIP2-512",
        pretrained: str | None = "webli",
        tokenizer: str | None = None,
        text_pretrained: str | None = None,
    ) -> None:
        if model_config(model)["vision_cfg"].get("timm_pool") != "map":
            raise UserError(f"SigLIP2: {model} does not have attention pooling. Use a model with SigLIP in its name.")
        half = (0.5, 0.5, 0.5)
        super().__init__(model, pretrained, tokenizer, text_pretrained, mean=half, std=half)
        self.read_facts()

    @property
    def trunk(self) -> Any:
        """VisionTransformer of timm."""
        return self.visual.trunk

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        return pooled_values(self.trunk.attn_pool, self.trunk.norm(tokens))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {**super().parameter_groups(), "head": pool_parameters(self.trunk.attn_pool)}


def pooled_values(pool: Any, tokens: Tensor) -> Tensor:
    """Apply the value path of timm's attention pooling to each token: (B, n, D) -> (B, n, D)."""
    width = tokens.shape[-1]
    values = pool.proj(F.linear(tokens, pool.kv.weight[width:], pool.kv.bias[width:]))
    features: Tensor = values + pool.mlp(pool.norm(values))
    return features


def pool_parameters(pool: Any) -> list[nn.Parameter]:
    """Return the parameters of the value path of timm's attention pooling."""
    return [p for part in (pool.kv, pool.proj, pool.norm, pool.mlp) for p in part.parameters()]
