"""Common base of the open_clip backbones: vision tower, pretrained weights by tag or path, and text tower.

Each tower is built separately, because SigLIP2's text tower is twice as large as its vision tower and is
not needed for training. open_clip is imported inside functions: the import takes seconds (it includes
torchvision and torch's compiler) and is not needed by `spar fit --help` or by other backbones.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spar_lightning.backbones.base import Backbone, TextTower
from spar_lightning.backbones.open_clip_config import (
    CONFIG,
    model_config,
    pretrained_config,
    quick_gelu,
    settings,
    warn_if_assumed,
)
from spar_lightning.backbones.prompt_length import token_counts, warn_if_cut
from spar_lightning.backbones.weights import WeightsError, check_fit, find, read, skipped
from spar_lightning.errors import UserError, nearest
from spar_lightning.files.hashing import hash_file

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

# Identifier on the Hugging Face Hub and conditions, by pattern of open_clip's pretrained tag. Others have other terms.
LICENCES = {
    "webli": ("apache-2.0", "Apache-2.0 (Google). Keep its notice and state that the weights were changed."),
    "openai": ("mit", "MIT (OpenAI). Keep its notice."),
    "laion": ("mit", "MIT (LAION). Keep its notice."),
    "datacomp": ("mit", "MIT. Keep its notice."),
    "merged2b": ("mit", "MIT (BAAI). Keep its notice."),
    "meta$": ("apache-2.0", "Apache-2.0 (Meta). Keep its notice and state that the weights were changed."),
}


class OpenClipModel(Backbone):
    """Base class of backbones with a vision tower of open_clip and weights under open_clip's names.

    Args:
        model: Name of the model in open_clip.
        pretrained: Pretrained tag or path of the weights; None for random weights.
        tokenizer: Folder with the tokenizer files; None uses the tokenizer that open_clip selects.
        text_pretrained: Pretrained tag or path of the text tower; None uses `pretrained`.
        mean: Per-channel mean of the input, used if neither the tag nor the folder of the weights defines one.
        std: Per-channel standard deviation of the input, used in the same case.
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
        known = settings(model, pretrained)
        self.mean, self.std = known.get("mean", mean), known.get("std", std)
        self.quick_gelu = quick_gelu(model, pretrained)
        warn_if_assumed(model, pretrained, self.mean, self.std)
        self.visual: Any = vision_tower(model, self.quick_gelu)
        if pretrained is not None and not skipped():
            load_vision(self.visual, weights(model, pretrained), pretrained, model)
        self.eval()

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "quick_gelu": self.quick_gelu}  # not visible in the weights

    def text_identity(self) -> dict[str, Any] | None:
        return None if self.text_pretrained is None else text_key(self.model, self.text_pretrained, self.tokenizer)

    def random_weights(self) -> str | None:
        return "Set pretrained to a tag of open_clip or a path." if self.pretrained is None else None

    def licence(self) -> str:
        if self.pretrained is None:
            return "None: the base weights are random."
        if terms := self._terms():
            return f"Base weights `{self.pretrained}` of open_clip: {terms[1]}"
        return super().licence()

    def hub_metadata(self) -> dict[str, str]:
        repository = pretrained_config(self.model, self.pretrained).get("hf_hub", "").partition("@")[0].strip("/")
        found = {"base_model": "/".join(repository.split("/")[:2])} if repository else {}  # org/name/, or org/name/file
        terms = self._terms()
        return {**found, "license": terms[0]} if terms else found

    def _terms(self) -> tuple[str, str] | None:
        """Return identifier and conditions of the license of a pretrained tag, as far as known."""
        if not pretrained_config(self.model, self.pretrained):
            return None
        return next((terms for tag, terms in LICENCES.items() if re.match(tag, str(self.pretrained))), None)

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())  # names as in open_clip: visual.*

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        load_vision(self.visual, state_dict, "The state dict", self.model)

    def build_text_tower(self) -> TextTower:
        return text_tower(self.model, self.text_pretrained, self.tokenizer)


def text_key(model: str, pretrained: str, tokenizer: Any) -> dict[str, Any]:
    """Return the cache key of text embeddings.

    Args:
        model: Name of the model in open_clip.
        pretrained: Pretrained tag or path of the text tower.
        tokenizer: Name on the Hugging Face Hub or folder of the tokenizer; None if the model selects it.
    """
    known = pretrained_config(model, pretrained)
    weights = pretrained if known else hash_file(find(pretrained, FILES))
    recorded = settings(model, pretrained).get("quick_gelu") if not known else None
    if tokenizer is not None and Path(tokenizer).is_dir():
        files = sorted(path for path in Path(tokenizer).iterdir() if path.is_file())
        tokenizer = {path.name: hash_file(path) for path in files}
    found = {"family": "open_clip", "model": model, "weights": weights, "tokenizer": tokenizer}
    # Only if the folder of the weights demands it, so that older caches stay valid.
    return {**found, "quick_gelu": True} if recorded and not model_config(model).get("quick_gelu") else found


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
                f"{nearest(pretrained, tags)}Allowed tags: {', '.join(tags) or 'none'}. For another repository of the "
                "Hugging Face Hub, download it and pass the folder."
            )
        return read(pretrained, FILES)
    try:
        path = open_clip.download_pretrained(config)
    except Exception as error:  # the Hub client, sockets and proxies raise different exceptions
        raise WeightsError(
            f"The weights {pretrained!r} of {model} could not be downloaded ({type(error).__name__}: {error}). "
            f"{_by_hand(model, pretrained, config)}"
        ) from error
    return read(path)


def _by_hand(model: str, tag: str, config: Mapping[str, Any]) -> str:
    """Return how to get the weights of a tag without network access, with the settings that the tag brings."""
    repository, _, file = config.get("hf_hub", "").rpartition("/")
    if repository:
        return (
            f"Without network access, copy {CONFIG} and {file or FILES[0]} of {repository} to a folder on this machine "
            "and set `pretrained` to that folder. Both are needed: the first has the normalization and the activation."
        )
    quick = quick_gelu(model, tag) and not quick_gelu(model, None)
    return (
        f"Without network access, copy {config['url']} to this machine and set `pretrained` to its path"
        f"{f' and `model` to {model}-quickgelu' if quick else ''}."
    )


def load_vision(tower: nn.Module, tensors: Mapping[str, Tensor], source: str, model: str) -> None:
    """Load a vision tower from the tensors of both towers, of the vision tower, or of its timm model.

    Raises:
        WeightsError: The tensors do not match.
    """
    expected = tower.state_dict()
    inside = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    forms = (tensors, inside, {f"trunk.{name}": t for name, t in tensors.items()})
    own = max(forms, key=lambda form: len(form.keys() & expected.keys()))
    check_fit(own, expected, source, model)
    tower.load_state_dict(own)


def text_tower(model: str, pretrained: str | None, tokenizer: str | None) -> TextTower:
    """Build the frozen text tower with its tokenizer, a function from prompts to (Q, d)."""
    tokenize = _tokenizer(model, tokenizer)
    clip = both_towers(model, quick_gelu(model, pretrained), warn=pretrained is None)
    del clip.visual
    if pretrained is not None:
        own, expected = _text(weights(model, pretrained)), _text(clip.state_dict())
        if own.keys().isdisjoint(expected):
            raise WeightsError(
                f"{pretrained} does not contain the text tower of {model}. Set text_pretrained to a pretrained tag "
                "or to the path of a file that contains it."
            )
        check_fit(own, expected, pretrained, f"the text tower of {model}")
        clip.load_state_dict(own, strict=False)
    clip.eval().requires_grad_(False)

    def encode(prompts: Sequence[str]) -> Tensor:
        warn_if_cut(prompts, token_counts(tokenize, prompts), tokenize.context_length)
        return torch.as_tensor(clip.encode_text(tokenize(list(prompts))))

    return encode


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
