"""SigLIP2 NaFlex backbone of transformers: trained on many sizes and aspect ratios, a baseline of the paper.

Images are not padded. The positional embedding (16 x 16) is resized to the patch grid of the image as in
training: bilinear with antialiasing. Dense features use the value path of the attention pooling, as in
`siglip2.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones.base import Backbone, Grid, TextTower
from spar_lightning.backbones.pos_embed import placed
from spar_lightning.backbones.prompt_length import warn_if_cut
from spar_lightning.backbones.weights import WeightsError, check_fit, read, skipped
from spar_lightning.image.resize import check_sides

HUB = "google/siglip2-base-patch16-naflex"
CONTEXT = 64  # tokens of a prompt in training


class NaFlex(Backbone):
    """SigLIP2 NaFlex with dense features from the value path of its attention pooling.

    Args:
        pretrained: Name on the Hugging Face Hub, a local folder with config.json, model.safetensors and the
            tokenizer files, a weight file of the base size, or null for random weights of the base size.
        tokenizer: Folder with the tokenizer files. null loads them from `pretrained`, or from the Hugging Face
            Hub if `pretrained` is a weight file or null.
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    windowable = True

    def __init__(self, pretrained: str | None = HUB, tokenizer: str | None = None) -> None:
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        super().__init__()
        self.pretrained, self.tokenizer = pretrained, tokenizer
        self._file = pretrained is not None and Path(pretrained).is_file()  # weights only, without a config
        if pretrained is None or self._file or (skipped() and pretrained == HUB):  # HUB has the default config
            self.vision_model: Any = Siglip2VisionModel(Siglip2VisionConfig())
        elif skipped():
            self.vision_model = Siglip2VisionModel(_from_pretrained(Siglip2VisionConfig, pretrained))
        else:
            self.vision_model = _model(Siglip2VisionModel, pretrained)
        config = self.vision_model.config
        self.patch_size = config.patch_size
        side = int(config.num_patches**0.5)
        self.grid: Grid = (side, side)
        self.window = side * self.patch_size
        self.embed_dim = config.hidden_size
        if pretrained is not None and self._file and not skipped():
            self._load(read(pretrained), pretrained)
        self.eval()

    def embed(self, images: Tensor) -> Tensor:
        check_sides(images, self.patch_size)
        p, embeddings = self.patch_size, self.vision_model.embeddings
        (h, w) = grid = images.shape[-2] // p, images.shape[-1] // p
        # Flattened patches, channels last: (B, 3, H, W) -> (B, N, P * P * 3)
        patches = images.unflatten(2, (h, p)).unflatten(4, (w, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        positions = placed(self._positions, grid, self.grid, self.windowed)  # (1, N, D)
        tokens: Tensor = embeddings.patch_embedding(patches) + positions.to(images.dtype)
        return tokens

    def _positions(self, grid: Grid) -> Tensor:
        table = self.vision_model.embeddings.position_embedding.weight.T.unflatten(1, self.grid)[None]  # (1, D, 16, 16)
        square = F.interpolate(table.float(), grid, mode="bilinear", align_corners=False, antialias=True)
        return square.flatten(2).transpose(1, 2)

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        for layer in self.vision_model.encoder.layers[start:stop]:
            attn, x = layer.self_attn, layer.layer_norm1(tokens)
            parts = (attn.q_proj, attn.k_proj, attn.v_proj)
            q, k, v = (part(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
            tokens = tokens + attn.out_proj(self.attend(q, k, v, grids))
            tokens = tokens + layer.mlp(layer.layer_norm2(tokens))
        return tokens

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        head, width = self.vision_model.head, self.embed_dim
        pool = head.attention
        values = F.linear(
            self.vision_model.post_layernorm(tokens), pool.in_proj_weight[2 * width :], pool.in_proj_bias[2 * width :]
        )
        values = pool.out_proj(values)
        features: Tensor = values + head.mlp(head.layernorm(values))
        return features

    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.vision_model.post_layernorm
        return norm

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        model = self.vision_model
        groups = {
            "patch_embed": list(model.embeddings.patch_embedding.parameters()),
            "pos_embed": [model.embeddings.position_embedding.weight],
        }
        for i, layer in enumerate(model.encoder.layers):
            attn = layer.self_attn
            groups[f"blocks.{i}"] = list(layer.parameters())
            groups[f"blocks.{i}.mlp"] = list(layer.mlp.parameters())
            groups[f"blocks.{i}.qkv"] = [
                p for part in (attn.q_proj, attn.k_proj, attn.v_proj) for p in part.parameters()
            ]
        head = [p for name, p in model.head.named_parameters() if name != "probe"]
        return {**groups, "norm": list(model.post_layernorm.parameters()), "head": head}

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())  # names as in transformers: vision_model.*

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self._load(state_dict, "The state dict")

    def _load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load the vision tower from tensors that may include the text tower, or lack the prefix `vision_model.`."""
        vision = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
        vision = vision or {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
        check_fit(vision, self.state_dict(), source, "NaFlex")
        self.load_state_dict(vision)

    def random_weights(self) -> str | None:
        return "Set pretrained to a name on the Hugging Face Hub or a path." if self.pretrained is None else None

    def licence(self) -> str:
        if self.pretrained != HUB:
            return super().licence() if self.pretrained else "None: the base weights are random."
        return f"Base weights {HUB}: Apache-2.0 (Google). Keep its notice and state that the weights were changed."

    def hub_metadata(self) -> dict[str, str]:
        return {"base_model": HUB, "license": "apache-2.0"} if self.pretrained == HUB else {}

    def text_identity(self) -> dict[str, Any] | None:
        if self.tokenizer or Path(self._text_source).exists():  # local folders are not hashed or cached
            return None
        return {"family": "NaFlex", "weights": self._text_source}

    @property
    def _text_source(self) -> str:
        return HUB if self.pretrained is None or self._file else self.pretrained

    def build_text_tower(self) -> TextTower:
        from transformers import AutoTokenizer, Siglip2TextModel

        source = self._text_source
        model = _model(Siglip2TextModel, source)
        tokenizer = _from_pretrained(AutoTokenizer, self.tokenizer or source)
        tower = model.eval().requires_grad_(False)

        def encode(prompts: Sequence[str]) -> Tensor:
            # Text is pooled at the last position, so prompts are padded on the right to the training length.
            texts = [prompt.lower() for prompt in prompts]
            counts = [len(tokens) for tokens in tokenizer(texts, verbose=False)["input_ids"]]
            warn_if_cut(prompts, counts, CONTEXT)
            tokens = tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, padding_side="right",
                               return_tensors="pt")  # fmt: skip
            embeddings: Tensor = tower(input_ids=tokens["input_ids"]).pooler_output
            return embeddings

        return encode


def _model(cls: Any, source: str) -> Any:
    """Load a model in fp32; raise WeightsError where transformers would initialize missing weights at random."""
    model, found = _from_pretrained(cls, source, output_loading_info=True, dtype=torch.float32)
    if missing := sorted(found["missing_keys"]):
        raise WeightsError(
            f"{source} does not match {cls.__name__}: {len(missing)} tensors are missing (first: {missing[0]})."
        )
    return model


def _from_pretrained(cls: Any, source: str, **options: Any) -> Any:
    try:
        return cls.from_pretrained(source, **options)
    except Exception as error:  # transformers, the Hub client and sockets raise different exceptions
        raise WeightsError(
            f"NaFlex could not load {cls.__name__} from {source} ({type(error).__name__}). Pass a name on the Hugging "
            f"Face Hub, or a local folder with config.json, model.safetensors and the tokenizer files of {HUB}."
        ) from error
