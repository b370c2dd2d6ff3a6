"""DINOv3.txt backbone: timm's ViT and open_clip's text tower, with weights from Meta's two official files.

Dense features are the patch tokens after the final norm of the trunk. They correspond to the second half
of a text embedding (the first half corresponds to the class token). The vision head of the official model
is not used. The official code rounds the RoPE periods to bf16 and timm does not. They are always rounded
here, for weights from any source; otherwise patch tokens would differ by 1e-3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.backbones.base import Grid, TextTower
from spar_lightning.backbones.packing import patch_tokens
from spar_lightning.backbones.prompt_length import token_counts, warn_if_cut
from spar_lightning.backbones.timm_eva import EvaTrunk
from spar_lightning.backbones.weights import WeightsError, check_fit, find, read, skipped
from spar_lightning.errors import UserError
from spar_lightning.files.hashing import hash_file
from spar_lightning.image.resize import stretch

FORM = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
VISION_FILE = "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth"
TEXT_FILE = "dinov3_vitl16_dinotxt_vision_head_and_text_encoder-a442d8f5.pth"


class DINOv3Text(EvaTrunk):
    """DINOv3.txt ViT-L/16, or another DINOv3 ViT of timm, with patch tokens as dense features.

    Args:
        model: Name of the DINOv3 ViT in timm. Official text weights exist only for the default.
        backbone_weights: Path of Meta's backbone file or of a released student; null for random weights.
        text_weights: Path of Meta's file with the vision head and the text encoder; only needed for class names.
        window: Side of the teacher's windows in pixels. The paper uses 384.
    """

    paper_patch_fit = staticmethod(stretch)
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        model: str = "vit_large_patch16_dinov3_qkvb",
        backbone_weights: str | None = None,
        text_weights: str | None = None,
        window: int = 384,
    ) -> None:
        import timm

        super().__init__()
        if model not in timm.list_models("*dinov3_qkvb"):
            raise UserError(
                f"DINOv3Text: unknown model {model!r}. Allowed: {', '.join(timm.list_models('*dinov3_qkvb'))}."
            )
        self.model, self.backbone_weights, self.text_weights, self.window = (
            model,
            backbone_weights,
            text_weights,
            window,
        )
        trunk = _trunk(model, None if skipped() else backbone_weights)
        self.trunk = trunk
        self.patch_size = trunk.patch_embed.patch_size[0]
        self.embed_dim, self.prefix = trunk.num_features, trunk.num_prefix_tokens
        self.eval()
        self._round_periods()

    def _round_periods(self) -> None:
        periods = self.trunk.rope.periods
        periods.copy_(periods.bfloat16())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DINOv3Text":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._round_periods()  # timm recomputes them when the dtype changes
        return self

    def rotation(self, grid: Grid) -> Tensor:
        periods = self.trunk.rope.periods
        # Centers of the patches, in [-1, 1] along each axis.
        axes = [2 * (torch.arange(n, device=periods.device, dtype=torch.float32) + 0.5) / n - 1 for n in grid]
        if self.windowed is not None and self.windowed.positions == "windowed":  # distances as in the native grid
            native = self.window // self.patch_size
            # Lengths as tensors, because an export does not know them yet.
            axes = [axis * (torch.ones_like(axis).sum() / native).clamp(min=1) for axis in axes]
        places = torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2), y before x
        angles = (2 * torch.pi * places[:, :, None] / periods).flatten(1).tile(2)
        angles = F.pad(angles, (0, 0, self.prefix, 0))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        features: Tensor = self.trunk.norm(patch_tokens(tokens, grids, self.prefix))
        return features

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.trunk.state_dict())  # names as in timm

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        tensors = _of_tower(state_dict, "visual_model.backbone.")
        self.trunk.load_state_dict(_filled(self.model, tensors, "The state dict").state_dict())

    def random_weights(self) -> str | None:
        if self.backbone_weights is not None:
            return None
        return f"Request {VISION_FILE} at {FORM} and set backbone_weights to its path."

    def licence(self) -> str:
        if self.backbone_weights is None:
            return "None: the base weights are random."
        return (
            "DINOv3 License (Meta). A student is a derivative work: distribute it only under the same agreement, "
            "include a copy of the agreement, acknowledge the use of DINOv3 in publications, and follow its rules on "
            f"use and export. The text of the license is provided with the weights: {FORM}"
        )

    def hub_metadata(self) -> dict[str, str]:
        if self.backbone_weights is None:
            return {}
        known = self.model == "vit_large_patch16_dinov3_qkvb"
        return {
            **({"base_model": "facebook/dinov3-vitl16-pretrain-lvd1689m"} if known else {}),
            "license": "other",
            "license_name": "dinov3-license",
            "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
        }

    def text_identity(self) -> dict[str, Any] | None:
        if self.text_weights is None:
            return None
        return {"family": "DINOv3.txt", "weights": hash_file(find(self.text_weights, (TEXT_FILE,)))}

    def build_text_tower(self) -> TextTower:
        if self.text_weights is None:
            raise UserError(
                f"DINOv3Text needs text_weights to encode class names. Request {TEXT_FILE} at {FORM} and set "
                "model.backbone.init_args.text_weights to its path."
            )
        return _text_tower(_official(self.text_weights, TEXT_FILE, "text_model."), self.text_weights, self.embed_dim)


def _trunk(model: str, source: str | None) -> Any:
    """Build the trunk with random weights, or with the weights of a file."""
    import timm

    if source is None:
        return timm.create_model(model, num_classes=0)
    return _filled(model, _official(source, VISION_FILE, "visual_model.backbone."), source)


def _filled(model: str, tensors: dict[str, Tensor], source: str) -> Any:
    """Build the trunk from tensors named as in the official file, in timm or in a checkpoint of `spar fit`."""
    import timm

    trunk: Any
    if "storage_tokens" in tensors:  # official names, which timm converts on loading
        _check_official(tensors, source)
        try:
            overlay = {"state_dict": tensors}
            trunk = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
            del trunk.pretrained_cfg["state_dict"]  # timm would keep a second copy of the weights
            return trunk
        except (RuntimeError, KeyError) as error:
            raise WeightsError(f"{source} does not match {model}: {' '.join(str(error).split())}") from error
    trunk = timm.create_model(model, num_classes=0)
    tensors = {name.removeprefix("trunk."): tensor for name, tensor in tensors.items()}
    check_fit(tensors, trunk.state_dict(), source, model)
    trunk.load_state_dict(tensors)
    return trunk


def _check_official(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise WeightsError for unsuitable weights that timm would load without an error."""
    if any(name.startswith("local_cls_norm") for name in tensors):
        raise WeightsError(
            f"{source} is the backbone for satellite images (SAT-493M), but the text encoder was trained with another "
            f"backbone. Pass {VISION_FILE}."
        )
    periods = tensors.get("rope_embed.periods")
    if periods is not None and not torch.equal(periods.float(), _periods(len(periods))):
        raise WeightsError(f"{source} has RoPE periods that differ from DINOv3. Pass {VISION_FILE}.")


def _periods(count: int) -> Tensor:
    """Return the RoPE periods of the official files: 100^(k / count), rounded to bf16."""
    return torch.as_tensor(100.0 ** (torch.arange(count) / count)).bfloat16().float()


def _official(source: str, file: str, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of one tower, from an official file or from a released student with both towers."""
    try:
        tensors = read(source, (file,))
    except WeightsError as error:
        raise WeightsError(
            f"{error} DINOv3.txt consists of two files, {VISION_FILE} and {TEXT_FILE}, available on request at {FORM}. "
            f"This option needs {file}."
        ) from error
    return _of_tower(tensors, prefix)


def _of_tower(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors with a name prefix, without the prefix; all tensors if the file contains one tower only."""
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return inside or dict(tensors)


# Parts of a block: name in the official text tower -> name in open_clip.
_PARTS = {
    "attention_norm": "ln_1",
    "attention.qkv.weight": "attn.in_proj_weight",
    "attention.proj": "attn.out_proj",
    "ffn_norm": "ln_2",
    "feed_forward.fc1": "mlp.c_fc",
    "feed_forward.fc2": "mlp.c_proj",
}


def _renamed(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the official text tower as in open_clip.

    The official attention has no QKV bias; open_clip needs one, so it is set to zero.
    """
    tensors = {}
    for name, tensor in official.items():
        if name == "head.linear_projection.weight":
            tensors["text_projection"] = tensor.T
            continue
        name = name.removeprefix("backbone.").replace("blocks.", "transformer.resblocks.")
        for theirs, ours in _PARTS.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor
        if name.endswith("in_proj_weight"):
            tensors[name.replace("weight", "bias")] = tensor.new_zeros(len(tensor))
    return tensors


def _text_tower(official: Mapping[str, Tensor], source: str, embed_dim: int) -> TextTower:
    from open_clip import SimpleTokenizer
    from open_clip.transformer import TextTransformer

    tensors = _renamed(official)
    missing = {"token_embedding.weight", "positional_embedding", "text_projection"} - tensors.keys()
    if missing:
        raise WeightsError(
            f"{source} does not contain a DINOv3.txt text encoder. Missing: {', '.join(sorted(missing))}. "
            "Set text_weights to Meta's file with the text encoder."
        )
    (vocabulary, width), (context, _) = tensors["token_embedding.weight"].shape, tensors["positional_embedding"].shape
    outputs = tensors["text_projection"].shape[1]
    if outputs != 2 * embed_dim:
        raise WeightsError(
            f"{source} has text embeddings of 2 x {outputs // 2} channels, but the trunk has {embed_dim}. "
            "Use the trunk that the text encoder was trained with."
        )
    tower = TextTransformer(
        context_length=context,
        vocab_size=vocabulary,
        width=width,
        heads=width // 64,
        layers=sum(name.endswith("in_proj_weight") for name in tensors),
        output_dim=outputs,
    )
    check_fit(tensors, tower.state_dict(), source, "the text encoder of DINOv3.txt")
    tower.load_state_dict(tensors)
    tower.eval().requires_grad_(False)
    tokenize = SimpleTokenizer(context_length=context)

    def encode(prompts: Sequence[str]) -> Tensor:
        warn_if_cut(prompts, token_counts(tokenize, prompts), context)
        embeddings: Tensor = tower(tokenize(list(prompts)))[:, embed_dim:]
        return embeddings

    return encode
