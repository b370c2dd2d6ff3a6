"""C-RADIO backbones (NVIDIA): timm's ViT, the SigLIP2 adaptor, and the text encoder of SigLIP2 in open_clip.

Dense features are the patch tokens after the adaptor's summary head, which maps them to the text embedding space of
SigLIP2. The positional embedding is a table for 2048 x 2048 pixels: it is resized (bilinear) to a square that contains
the image, and its top left part is used, as in the official code and in transformers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones.base import Grid, TextTower
from spar_lightning.backbones.hub_weights import FILE, base_model, local
from spar_lightning.backbones.open_clip_base import text_key, text_tower
from spar_lightning.backbones.packing import patch_tokens
from spar_lightning.backbones.pos_embed import placed
from spar_lightning.backbones.timm_vit import TimmTrunk
from spar_lightning.backbones.weights import WeightsError, check_fit, read, skipped
from spar_lightning.errors import UserError

TABLE: Final = 2048  # image side of the positional embedding in pixels
ADAPTOR: Final = "radio_model.adaptors.siglip2-g.head_mlp."
PUBLISHED: Final = "nvidia/C-RADIO"
TEXT: Final = "ViT-gopt-16-SigLIP2-384"  # open_clip's model with the text encoder


class CRADIO(TimmTrunk):
    """C-RADIOv4 with dense features in the text embedding space of SigLIP2.

    Args:
        model: Name of the model in timm, such as vit_so400m_patch16_radio_v4 or vit_huge_patch16_radio_v4.
        pretrained: Name on the Hugging Face Hub, such as nvidia/C-RADIOv4-H, a folder with model.safetensors, a weight
            file, or null for random weights.
        text_pretrained: Pretrained tag of open_clip's ViT-gopt-16-SigLIP2-384, or path of its weights.
        tokenizer: Folder with the tokenizer files of SigLIP2; null downloads them from the Hugging Face Hub.
        window: Side of the teacher's windows in pixels.
    """

    crops_positions = True

    def __init__(
        self,
        model: str = "vit_so400m_patch16_radio_v4",
        pretrained: str | None = "nvidia/C-RADIOv4-SO400M",
        text_pretrained: str | None = "webli",
        tokenizer: str | None = None,
        window: int = 512,
    ) -> None:
        import timm

        if model not in timm.list_models("vit_*radio_v4"):
            raise UserError(
                f"CRADIO: unknown model {model!r}. Allowed: {', '.join(timm.list_models('vit_*radio_v4'))}."
            )
        super().__init__()
        self.model, self.pretrained = model, pretrained
        self.text_pretrained, self.tokenizer = text_pretrained, tokenizer
        self.trunk = timm.create_model(model, num_classes=0, img_size=TABLE)
        self.mean, self.std = self.trunk.pretrained_cfg["mean"], self.trunk.pretrained_cfg["std"]
        self.read_facts()
        self.table, self.grid, self.window = self.grid, (window // self.patch_size,) * 2, window
        self.head = Adaptor(self.trunk.num_features, hidden=self.trunk.num_features, blocks=0)
        self.embed_dim = self.head.width
        if pretrained is not None and not skipped():
            self._load(read(str(local(pretrained)), (FILE,)), pretrained)
        self.eval()

    def positions(self, grid: Grid, table: Tensor) -> Tensor:
        return placed(partial(_cropped, table, native=self.table), grid, self.grid, self.windowed)

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        features: Tensor = self.head(self.trunk.norm(patch_tokens(tokens, grids, self.prefix)))
        return features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {**super().parameter_groups(), "head": list(self.head.parameters())}

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())  # trunk.* as in timm, head.* as in the official adaptor

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self._load(state_dict, "The state dict")

    def _load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        own = _renamed(tensors, source)
        if "head.fc1.weight" not in own:
            raise WeightsError(f"{source} has no SigLIP2 adaptor ({ADAPTOR}*). Without it, features do not match text.")
        hidden, width = own["head.fc1.weight"].shape
        blocks = sum(name.startswith("head.blocks.") and name.endswith(".2.weight") for name in own)
        first = next(self.head.parameters())
        head = Adaptor(width, hidden, blocks).to(first).requires_grad_(first.requires_grad).eval()
        expected = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("head.")}
        check_fit(own, expected | {f"head.{n}": t for n, t in head.state_dict().items()}, source, self.model)
        self.head = head
        self.load_state_dict(own)

    def random_weights(self) -> str | None:
        return "Set pretrained to a name on the Hugging Face Hub or a path." if self.pretrained is None else None

    def licence(self) -> str:
        if self.pretrained is None:
            return "None: the base weights are random."
        if not self.pretrained.startswith(PUBLISHED):
            return super().licence()
        return (
            "NVIDIA Open Model License. Commercial use is allowed; a student is a derivative model: include a copy of "
            'the agreement and the notice "Licensed by NVIDIA Corporation under the NVIDIA Open Model License".'
        )

    def hub_metadata(self) -> dict[str, str]:
        if self.pretrained is None or not self.pretrained.startswith(PUBLISHED):
            return {}
        return {
            **base_model(self.pretrained),
            "license": "other",
            "license_name": "nvidia-open-model-license",
            "license_link": "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license",
        }

    def text_identity(self) -> dict[str, Any] | None:
        return None if self.text_pretrained is None else text_key(TEXT, self.text_pretrained, self.tokenizer)

    def build_text_tower(self) -> TextTower:
        return text_tower(TEXT, self.text_pretrained, self.tokenizer)


class Adaptor(nn.Module):
    """MLP with residual blocks from tokens (.., D) to text embeddings (.., 1536), with the names of the official one.

    Args:
        inputs: Width D.
        hidden: Width of the hidden layers.
        blocks: Number of residual blocks.
    """

    width = 1536  # of SigLIP2 giant

    def __init__(self, inputs: int, hidden: int, blocks: int) -> None:
        super().__init__()

        def block(outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))

        self.fc1 = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(block(hidden) for _ in range(blocks))
        self.final = block(self.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings (.., 1536) of tokens (.., D)."""
        x = self.fc1(tokens)
        for block in self.blocks:
            x = x + block(x)
        embeddings: Tensor = self.final(x)
        return embeddings


def _cropped(table: Tensor, grid: Grid, native: Grid) -> Tensor:
    """Resize a table (1, native h * native w, D) to a square and take its top left part: (1, h * w, D)."""
    side = max(grid)
    square = table.transpose(1, 2).unflatten(2, native).float()
    square = F.interpolate(square, (side, side), mode="bilinear", align_corners=False)
    return square[:, :, : grid[0], : grid[1]].flatten(2).transpose(1, 2).to(table.dtype)


def _renamed(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename the tensors of the official file: trunk.* as in timm, and head.* of the SigLIP2 adaptor."""
    prefix, generator = "radio_model.model.", "radio_model.model.patch_generator."
    if not any(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    parts = ("embedder.weight", "pos_embed", "cls_token.token")
    if missing := [part for part in parts if generator + part not in tensors]:
        raise WeightsError(f"{source} is not a C-RADIO ViT: {generator}{missing[0]} is missing.")
    kernel, table, first = (tensors[generator + part] for part in parts)
    side = round((kernel.shape[1] // 3) ** 0.5)
    own = {
        "trunk.patch_embed.proj.weight": kernel.unflatten(1, (3, side, side)),
        "trunk.patch_embed.proj.bias": kernel.new_zeros(len(kernel)),
        "trunk.pos_embed": table,
        "trunk.cls_token": first[None, :1],  # one class token per teacher, then registers
        "trunk.reg_token": first[None, 1:],
    }
    # Other tensors, such as those of the embedding of videos, have no part in the features. transformers adds layer
    # scales of 1.
    blocks = {n: t for n, t in tensors.items() if n.startswith(f"{prefix}blocks.") and ".layer_scale" not in n}
    own |= {f"trunk.{name.removeprefix(prefix)}": tensor for name, tensor in blocks.items()}
    return own | {f"head.{n.removeprefix(ADAPTOR)}": t for n, t in tensors.items() if n.startswith(ADAPTOR)}
