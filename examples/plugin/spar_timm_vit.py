"""Plain ViTs of timm as a backbone for spar-lightning; dense features are the patch tokens after the final norm."""

from spar_lightning.backbones.packing import patch_tokens
from spar_lightning.backbones.timm_vit import TimmTrunk
from spar_lightning.backbones.weights import check_fit
from spar_lightning.errors import UserError


class TimmViT(TimmTrunk):
    """VisionTransformer of timm with a learned positional embedding.

    Args:
        model: Name of the model in timm, such as vit_small_patch16_224.
        pretrained: Whether to download the pretrained weights of timm; otherwise the weights are random.
    """

    def __init__(self, model: str = "vit_tiny_patch16_224", pretrained: bool = False) -> None:
        import timm  # imported here, so that `spar` starts fast with other backbones

        super().__init__()
        self.trunk = timm.create_model(model, pretrained=pretrained, num_classes=0)
        self.pretrained = pretrained
        self.mean, self.std = self.trunk.pretrained_cfg["mean"], self.trunk.pretrained_cfg["std"]
        self.read_facts()
        self.eval()

    def project(self, tokens, grids):
        return self.trunk.norm(patch_tokens(tokens, grids, self.trunk.num_prefix_tokens))

    def vision_state_dict(self):
        return dict(self.trunk.state_dict())

    def load_vision_state_dict(self, state_dict):
        check_fit(state_dict, self.trunk.state_dict(), "The state dict", "TimmViT")
        self.trunk.load_state_dict(state_dict)

    def random_weights(self):
        return None if self.pretrained else "Set model.backbone.init_args.pretrained to true."

    def build_text_tower(self):
        raise UserError("TimmViT has no text encoder, so it cannot be evaluated on class names.")
