"""Plain ViTs of timm as a backbone for spar-lightning, with a linear layer into the text space of a CLIP model."""

from torch import nn

from spar_lightning.backbones.open_clip_base import text_key, text_tower
from spar_lightning.backbones.packing import patch_tokens
from spar_lightning.backbones.timm_vit import TimmTrunk
from spar_lightning.backbones.weights import check_fit, read


class TimmViT(TimmTrunk):
    """VisionTransformer of timm with a linear layer into the text embedding space of CLIP.

    Args:
        model: Name of the model in timm, such as vit_small_patch14_reg4_dinov2.
        weights: Path of a state dict with trunk.* and head.*; null for random weights.
        text: Pretrained tag or path of open_clip's ViT-B-16, for its text encoder.
    """

    def __init__(self, model="vit_tiny_patch16_224", weights: str | None = None, text="openai") -> None:
        import timm  # imported here, so that `spar` starts fast with other backbones

        super().__init__()
        self.weights, self.text = weights, text
        self.trunk = timm.create_model(model, num_classes=0)
        self.mean, self.std = self.trunk.pretrained_cfg["mean"], self.trunk.pretrained_cfg["std"]
        self.read_facts()
        self.head, self.embed_dim = nn.Linear(self.trunk.num_features, 512), 512  # width of CLIP ViT-B-16
        if weights is not None:
            self.load_vision_state_dict(read(weights, expected=self.state_dict()))
        self.eval()

    def project(self, tokens, grids):
        return self.head(self.trunk.norm(patch_tokens(tokens, grids, self.prefix)))

    def parameter_groups(self):
        return {**super().parameter_groups(), "head": list(self.head.parameters())}

    def vision_state_dict(self):
        return dict(self.state_dict())

    def load_vision_state_dict(self, state_dict):
        check_fit(state_dict, self.state_dict(), "The state dict", "TimmViT")
        self.load_state_dict(state_dict)

    def text_identity(self):
        return text_key("ViT-B-16", self.text, None)

    def build_text_tower(self):
        return text_tower("ViT-B-16", self.text, None)
