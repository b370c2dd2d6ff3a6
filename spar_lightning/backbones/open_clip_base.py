"""What the families of open_clip share: a vision tower, its weights by tag or path, the text tower.

A tower is built alone: SigLIP2's text tower is twice as large as its vision tower, and training needs
no text. open_clip is imported where it is called: with torchvision and torch's compiler it takes
seconds, which `spar fit --help` and runs of other backbones need not pay.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spar_lightning.backbones.base import Backbone, TextTower
from spar_lightning.backbones.weights import WeightsError, check_fit, find, read, skipped
from spar_lightning.errors import UserError, nearest
from spar_lightning.files.hashing import hash_file

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

# By the start of open_clip's tag. Others have terms of their own.
LICENCES = {
    "webli": "Apache-2.0 (Google). Keep its notice and say that the weights were changed.",
    "openai": "MIT (OpenAI). Keep its notice.",
    "laion": "MIT (LAION). Keep its notice.",
    "datacomp": "MIT. Keep its notice.",
}


class OpenClipModel(Backbone):
    """A backbone around one vision tower of open_clip, with weights in open_clip's names.

    Args:
        model: open_clip's name.
        pretrained: Tag, path, or None for random weights.
        tokenizer: Folder with the tokenizer's files, or None for open_clip's own choice.
        text_pretrained: Tag or path of the text tower, or None where it lies with `pretrained`.
        mean: Per-channel mean, unless the tag has its own.
        std: Per-channel standard deviation, unless the tag has its own.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None,
        tokenizer: str | None,
        text_pretrained: str | None,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.model, self.pretrained = model, pretrained
        self.tokenizer, self.text_pretrained = tokenizer, text_pretrained or pretrained
        known = pretrained_config(model, pretrained)
        self.mean, self.std = known.get("mean", mean), known.get("std", std)
        self.quick_gelu = quick_gelu(model, pretrained)
        self.visual: Any = vision_tower(model, self.quick_gelu)
        if pretrained is not None and not skipped():
            load_vision(self.visual, weights(model, pretrained), pretrained, model)
        self.eval()

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "quick_gelu": self.quick_gelu}  # the same weights serve both

    def text_identity(self) -> dict[str, Any] | None:
        if self.text_pretrained is None:
            return None
        known = pretrained_config(self.model, self.text_pretrained)
        weights = self.text_pretrained if known else hash_file(find(self.text_pretrained, FILES))
        tokenizer: Any = self.tokenizer  # a name on the hub, or a folder
        if tokenizer is not None and Path(tokenizer).is_dir():
            files = sorted(path for path in Path(tokenizer).iterdir() if path.is_file())
            tokenizer = {path.name: hash_file(path) for path in files}
        return {"family": "open_clip", "model": self.model, "weights": weights, "tokenizer": tokenizer}

    def licence(self) -> str:
        if self.pretrained is None:
            return "None: the base weights are random."
        for start, text in LICENCES.items():
            if pretrained_config(self.model, self.pretrained) and self.pretrained.startswith(start):
                return f"Of the base weights `{self.pretrained}` of open_clip: {text}"
        return super().licence()

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())  # visual. ..

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        load_vision(self.visual, state_dict, "the state dict", self.model)

    def build_text_tower(self) -> TextTower:
        return text_tower(self.model, self.text_pretrained, self.tokenizer)


def model_config(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model.

    Raises:
        UserError: open_clip lists no such model.
    """
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        names = open_clip.list_models()
        raise UserError(
            f"open_clip has no model {model!r}. {nearest(model, names)}open_clip.list_models() names all {len(names)}."
        )
    return config


def pretrained_config(model: str, pretrained: str | None) -> dict[str, Any]:
    """What open_clip knows about a tag of pretrained weights; empty for a path or None."""
    import open_clip

    return dict(open_clip.get_pretrained_cfg(model, pretrained)) if pretrained else {}


def quick_gelu(model: str, pretrained: str | None) -> bool:
    """Whether the weights were trained with QuickGELU: the model says so, or the tag."""
    known = pretrained_config(model, pretrained)
    return bool(model_config(model).get("quick_gelu", False) or known.get("quick_gelu", False))


def vision_tower(model: str, quick_gelu: bool = False) -> nn.Module:
    """The vision tower with random weights."""
    from open_clip.model import _build_vision_tower

    config = model_config(model)
    # open_clip has no public way to a single tower: its factory builds both.
    tower: nn.Module = _build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu)
    return tower


def weights(model: str, pretrained: str) -> dict[str, Tensor]:
    """All tensors of a model, in open_clip's names, from a local file or folder or from the hub by tag.

    Raises:
        WeightsError: Neither a tag nor a path, or no network; the sentence names the file that is needed.
    """
    import open_clip

    config = pretrained_config(model, pretrained)
    if not config:
        if not Path(pretrained).exists():
            tags = open_clip.list_pretrained_tags_by_model(model)
            raise WeightsError(
                f"pretrained: {pretrained!r} is neither a file nor a folder nor a tag of {model}. "
                f"{nearest(pretrained, tags)}Its tags are {', '.join(tags) or 'none'}."
            )
        return read(pretrained, FILES)
    try:
        path = open_clip.download_pretrained(config)
    except Exception as error:  # the hub's client, sockets and proxies each raise their own
        repository, _, file = config.get("hf_hub", "").rpartition("/")
        where = f"{file or FILES[0]} of {repository}" if repository else config["url"]
        raise WeightsError(
            f"The weights {pretrained!r} of {model} could not be downloaded ({type(error).__name__}: {error}). "
            f"Without a network, copy {where} here and give its path as `pretrained`."
        ) from error
    return read(path)


def load_vision(tower: nn.Module, tensors: Mapping[str, Tensor], source: str, model: str) -> None:
    """Load the entries `visual.*` into a vision tower, strictly."""
    own = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    check_fit(own, tower.state_dict(), source, model)
    tower.load_state_dict(own)


def text_tower(model: str, pretrained: str | None, tokenizer: str | None) -> TextTower:
    """The frozen text tower with its tokenizer, prompts -> (Q, d)."""
    tokenize = _tokenizer(model, tokenizer)
    clip = both_towers(model, quick_gelu(model, pretrained), warn=pretrained is None)
    del clip.visual
    if pretrained is not None:
        own, expected = _text(weights(model, pretrained)), _text(clip.state_dict())
        if not own:
            raise WeightsError(
                f"{pretrained} holds no text tower of {model}. Say where it comes from: text_pretrained takes a tag "
                "or a path, like pretrained."
            )
        check_fit(own, expected, pretrained, f"the text tower of {model}")
        clip.load_state_dict(own, strict=False)
    clip.eval().requires_grad_(False)
    return lambda prompts: torch.as_tensor(clip.encode_text(tokenize(list(prompts))))


def both_towers(model: str, quick_gelu: bool, warn: bool) -> Any:
    """The whole model with random weights, of which open_clip may warn."""
    import open_clip

    level = logging.root.manager.disable
    if not warn:
        logging.disable(logging.WARNING)
    try:
        return open_clip.create_model(
            model, require_pretrained=False, pretrained_text=False, force_quick_gelu=quick_gelu
        )
    finally:
        logging.disable(level)


def _text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that text embeddings depend on: not vision, not the scale of the logits."""
    others = ("visual.", "logit_")
    return {n: t for n, t in tensors.items() if not n.startswith(others) and not n.endswith("position_ids")}


def _tokenizer(model: str, path: str | None) -> Any:
    import open_clip

    text = model_config(model)["text_cfg"]
    name = text.get("hf_tokenizer_name")
    if name is None:
        return open_clip.get_tokenizer(model)
    try:
        tokenizer = open_clip.tokenizer.HFTokenizer(
            path or name, context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {})
        )
    except Exception as error:  # as above
        raise UserError(
            f"The tokenizer {path or name} of {model} could not be loaded ({type(error).__name__}). Copy its files "
            "(tokenizer.json, tokenizer_config.json) into a folder and give that as `tokenizer`."
        ) from error
    # SigLIP pools the last position and was trained with padding on the right.
    tokenizer.tokenizer.padding_side = "right"
    return tokenizer
