"""Common base of the open_clip backbones: vision tower, pretrained weights by tag or path, and text tower.

Each tower is built separately, because SigLIP2's text tower is twice as large as its vision tower and is
not needed for training. open_clip is imported inside functions: the import takes seconds (it includes
torchvision and torch's compiler) and is not needed by `spar fit --help` or by other backbones.
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

# By prefix of open_clip's pretrained tag. Other tags have other terms.
LICENCES = {
    "webli": "Apache-2.0 (Google). Keep its notice and state that the weights were changed.",
    "openai": "MIT (OpenAI). Keep its notice.",
    "laion": "MIT (LAION). Keep its notice.",
    "datacomp": "MIT. Keep its notice.",
}


class OpenClipModel(Backbone):
    """Base class of backbones with a vision tower of open_clip and weights under open_clip's names.

    Args:
        model: Name of the model in open_clip.
        pretrained: Pretrained tag or path of the weights; None for random weights.
        tokenizer: Folder with the tokenizer files; None uses the tokenizer that open_clip selects.
        text_pretrained: Pretrained tag or path of the text tower; None uses `pretrained`.
        mean: Per-channel mean of the input, used if the tag does not define one.
        std: Per-channel standard deviation of the input, used if the tag does not define one.
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
        return {**super().identity(), "quick_gelu": self.quick_gelu}  # not visible in the weights

    def text_identity(self) -> dict[str, Any] | None:
        if self.text_pretrained is None:
            return None
        known = pretrained_config(self.model, self.text_pretrained)
        weights = self.text_pretrained if known else hash_file(find(self.text_pretrained, FILES))
        tokenizer: Any = self.tokenizer  # a name on the Hugging Face Hub, or a folder
        if tokenizer is not None and Path(tokenizer).is_dir():
            files = sorted(path for path in Path(tokenizer).iterdir() if path.is_file())
            tokenizer = {path.name: hash_file(path) for path in files}
        return {"family": "open_clip", "model": self.model, "weights": weights, "tokenizer": tokenizer}

    def licence(self) -> str:
        if self.pretrained is None:
            return "None: the base weights are random."
        for start, text in LICENCES.items():
            if pretrained_config(self.model, self.pretrained) and self.pretrained.startswith(start):
                return f"Base weights `{self.pretrained}` of open_clip: {text}"
        return super().licence()

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())  # names as in open_clip: visual.*

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        load_vision(self.visual, state_dict, "The state dict", self.model)

    def build_text_tower(self) -> TextTower:
        return text_tower(self.model, self.text_pretrained, self.tokenizer)


def model_config(model: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model.

    Raises:
        UserError: open_clip does not have this model.
    """
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        names = open_clip.list_models()
        raise UserError(
            f"open_clip has no model {model!r}. {nearest(model, names)}open_clip.list_models() lists all {len(names)}."
        )
    return config


def pretrained_config(model: str, pretrained: str | None) -> dict[str, Any]:
    """Return open_clip's configuration of a pretrained tag; empty for a path or None."""
    import open_clip

    return dict(open_clip.get_pretrained_cfg(model, pretrained)) if pretrained else {}


def quick_gelu(model: str, pretrained: str | None) -> bool:
    """Return whether the weights were trained with QuickGELU, according to the model or to the tag."""
    known = pretrained_config(model, pretrained)
    return bool(model_config(model).get("quick_gelu", False) or known.get("quick_gelu", False))


def vision_tower(model: str, quick_gelu: bool = False) -> nn.Module:
    """Build the vision tower with random weights."""
    from open_clip.model import _build_vision_tower

    config = model_config(model)
    # The public factory of open_clip always builds both towers.
    tower: nn.Module = _build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu)
    return tower


def weights(model: str, pretrained: str) -> dict[str, Tensor]:
    """Load all tensors of a model, under open_clip's names, from a local file or folder, or by tag from the hub.

    Raises:
        WeightsError: `pretrained` is not a tag or a path, or the download failed. The message names the file to
            download.
    """
    import open_clip

    config = pretrained_config(model, pretrained)
    if not config:
        if not Path(pretrained).exists():
            tags = open_clip.list_pretrained_tags_by_model(model)
            raise WeightsError(
                f"pretrained: {pretrained!r} is not a file, a folder or a pretrained tag of {model}. "
                f"{nearest(pretrained, tags)}Allowed tags: {', '.join(tags) or 'none'}."
            )
        return read(pretrained, FILES)
    try:
        path = open_clip.download_pretrained(config)
    except Exception as error:  # the Hub client, sockets and proxies raise different exceptions
        repository, _, file = config.get("hf_hub", "").rpartition("/")
        where = f"{file or FILES[0]} of {repository}" if repository else config["url"]
        raise WeightsError(
            f"The weights {pretrained!r} of {model} could not be downloaded ({type(error).__name__}: {error}). "
            f"Without network access, copy {where} to this machine and set `pretrained` to its path."
        ) from error
    return read(path)


def load_vision(tower: nn.Module, tensors: Mapping[str, Tensor], source: str, model: str) -> None:
    """Load the tensors `visual.*` into a vision tower; raise WeightsError if they do not match."""
    own = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    check_fit(own, tower.state_dict(), source, model)
    tower.load_state_dict(own)


def text_tower(model: str, pretrained: str | None, tokenizer: str | None) -> TextTower:
    """Build the frozen text tower with its tokenizer, a function from prompts to (Q, d)."""
    tokenize = _tokenizer(model, tokenizer)
    clip = both_towers(model, quick_gelu(model, pretrained), warn=pretrained is None)
    del clip.visual
    if pretrained is not None:
        own, expected = _text(weights(model, pretrained)), _text(clip.state_dict())
        if not own:
            raise WeightsError(
                f"{pretrained} does not contain the text tower of {model}. Set text_pretrained to a pretrained tag "
                "or to the path of a file that contains it."
            )
        check_fit(own, expected, pretrained, f"the text tower of {model}")
        clip.load_state_dict(own, strict=False)
    clip.eval().requires_grad_(False)
    return lambda prompts: torch.as_tensor(clip.encode_text(tokenize(list(prompts))))


def both_towers(model: str, quick_gelu: bool, warn: bool) -> Any:
    """Build both towers with random weights; `warn` keeps open_clip's warning about them."""
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
    """Return the tensors that affect text embeddings, without the vision tower and the logit scale."""
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
    except Exception as error:  # the Hub client and sockets raise different exceptions
        raise UserError(
            f"The tokenizer {path or name} of {model} could not be loaded ({type(error).__name__}). Copy its files "
            "(tokenizer.json, tokenizer_config.json) into a folder and set `tokenizer` to that folder."
        ) from error
    # SigLIP pools text at the last position and was trained with padding on the right.
    tokenizer.tokenizer.padding_side = "right"
    return tokenizer
