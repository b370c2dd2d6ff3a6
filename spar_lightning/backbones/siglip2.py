"""SigLIP2 (and SigLIP) through open_clip: ViTs of timm whose attention pooling leads into the text space.

Dense features take the value path of that pooling, token by token: v = out_proj(W_v x), then
v + MLP(LN(v)) (paper, section 3). The pooling query and the keys play no part in them.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.open_clip_base import OpenClipModel, model_config
from spar_lightning.backbones.timm_vit import TimmTrunk
from spar_lightning.errors import UserError
from spar_lightning.image.resize import pad


class SigLIP2(OpenClipModel, TimmTrunk):
    """A SigLIP or SigLIP2 vision tower of open_clip, dense by the value path of its pooling.

    Args:
        model: open_clip's name, such as ViT-B-16-SigLIP2-512 or ViT-SO400M-14-SigLIP2-378.
        pretrained: open_clip's tag of weights (downloaded once), the path of a file or folder with
            them, or null for random weights.
        tokenizer: Folder with the tokenizer's files, where there is no network; null takes it from the hub.
        text_pretrained: Tag or path of the text tower where `pretrained` is a student without one.
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
            raise UserError(f"SigLIP2: {model} has no attention pooling. Give a model with SigLIP in its name.")
        half = (0.5, 0.5, 0.5)
        super().__init__(model, pretrained, tokenizer, text_pretrained, mean=half, std=half)
        self.read_facts()

    @property
    def trunk(self) -> Any:
        """Timm's VisionTransformer."""
        return self.visual.trunk

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        pool, width = self.trunk.attn_pool, self.embed_dim
        values = F.linear(self.trunk.norm(tokens), pool.kv.weight[width:], pool.kv.bias[width:])
        values = pool.proj(values)
        features: Tensor = values + pool.mlp(pool.norm(values))
        return features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        pool = self.trunk.attn_pool
        head = [p for part in (pool.kv, pool.proj, pool.norm, pool.mlp) for p in part.parameters()]
        return {**super().parameter_groups(), "head": head}
