"""TIPSv2 backbones (Google DeepMind): timm's ViT and the text encoder of transformers, with the official weights.

Dense features are the patch tokens after the final norm, where the value path replaces attention in the last block, as
in the zero-shot segmentation of the official repository. The positional embedding is resized bilinear with
antialiasing, as there and in transformers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from torch import Tensor

from spar_lightning.backbones.base import Grid, TextTower
from spar_lightning.backbones.hub_weights import FILE, base_model, identity, local, text_model
from spar_lightning.backbones.packing import patch_tokens
from spar_lightning.backbones.pos_embed import antialiased, placed
from spar_lightning.backbones.prompt_length import warn_if_cut
from spar_lightning.backbones.timm_vit import TimmTrunk
from spar_lightning.backbones.weights import check_fit, read, skipped
from spar_lightning.errors import UserError

PUBLISHED: Final = "google/tipsv2"
CONTEXT: Final = 64  # tokens of a prompt in training
TOKENIZER: Final = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Parts of names: official -> timm.
NAMES: Final = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


class TIPSv2(TimmTrunk):
    """TIPSv2 ViT with dense features from the value path of its last block.

    Args:
        model: Name of the model in timm: vit_base_patch14_reg1_tipsv2, or large, so400m or giant instead of base.
        pretrained: Name on the Hugging Face Hub, such as google/tipsv2-l14, a folder with model.safetensors and the
            tokenizer, a weight file, or null for random weights.
        text_pretrained: Name or folder with the text encoder and the tokenizer, needed if `pretrained` is a student
            without them; null uses `pretrained`.
    """

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)
    value_path = True

    def __init__(
        self,
        model: str = "vit_base_patch14_reg1_tipsv2",
        pretrained: str | None = "google/tipsv2-b14",
        text_pretrained: str | None = None,
    ) -> None:
        import timm

        if model not in timm.list_models("*tipsv2"):
            raise UserError(f"TIPSv2: unknown model {model!r}. Allowed: {', '.join(timm.list_models('*tipsv2'))}.")
        super().__init__()
        self.model, self.pretrained, self.text_pretrained = model, pretrained, text_pretrained or pretrained
        self.trunk = timm.create_model(model, num_classes=0)
        self.read_facts()
        if pretrained is not None and not skipped():
            self._load(read(str(local(pretrained)), (FILE,)), pretrained)
        self.eval()

    def positions(self, grid: Grid, table: Tensor) -> Tensor:
        return placed(partial(antialiased, table, native=self.grid, mode="bilinear"), grid, self.grid, self.windowed)

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        features: Tensor = self.trunk.norm(patch_tokens(tokens, grids, self.prefix))
        return features

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.trunk.state_dict())  # names as in timm

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self._load(state_dict, "The state dict")

    def _load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        own = _renamed(tensors)
        check_fit(own, self.trunk.state_dict(), source, self.model)
        self.trunk.load_state_dict(own)

    def random_weights(self) -> str | None:
        return "Set pretrained to a name on the Hugging Face Hub or a path." if self.pretrained is None else None

    def licence(self) -> str:
        if self.pretrained is None:
            return "None: the base weights are random."
        if not self.pretrained.startswith(PUBLISHED):
            return super().licence()
        return "TIPSv2: Apache-2.0 (Google). Keep its notice and state that the weights were changed."

    def hub_metadata(self) -> dict[str, str]:
        if self.pretrained is None or not self.pretrained.startswith(PUBLISHED):
            return {}
        return {**base_model(self.pretrained), "license": "apache-2.0"}

    def text_identity(self) -> dict[str, Any] | None:
        if self.text_pretrained is None:
            return None
        return {"family": "TIPSv2", "weights": identity(self.text_pretrained, TOKENIZER)}

    def build_text_tower(self) -> TextTower:
        from transformers import AutoTokenizer, Tipsv2TextModel

        if self.text_pretrained is None:
            raise UserError(
                "TIPSv2 needs text_pretrained to encode class names: a name on the Hugging Face Hub or a folder."
            )
        tower, tokenizer = text_model(self.text_pretrained, Tipsv2TextModel, AutoTokenizer, TOKENIZER)

        def encode(prompts: Sequence[str]) -> Tensor:
            texts = [prompt.lower() for prompt in prompts]
            warn_if_cut(prompts, [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]], CONTEXT)
            tokens = tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
            found: Tensor = tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
            return found

        return encode


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the official vision tower as in timm, where positions of the class token are part of it."""
    inside = {n.removeprefix("vision_encoder."): t for n, t in tensors.items() if n.startswith("vision_encoder.")}
    own = inside or {name.removeprefix("trunk."): tensor for name, tensor in tensors.items()}
    if "register_tokens" not in own:
        return own
    for theirs, ours in NAMES.items():
        own = {name.replace(theirs, ours): tensor for name, tensor in own.items()}
    own.pop("mask_token", None)
    own["reg_token"], table = own.pop("register_tokens"), own["pos_embed"]
    own["cls_token"], own["pos_embed"] = own["cls_token"] + table[:, :1], table[:, 1:]
    return own
