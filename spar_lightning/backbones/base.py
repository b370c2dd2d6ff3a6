"""Interface of a backbone, the vision-language ViT that all other modules use.

A plugin author subclasses `Backbone` and implements its abstract methods. The forward pass is split
into three steps (`embed`, `run_blocks`, `project`), so that the output of a student's frozen blocks can
be cached, and so that images of different sizes can be packed into one sequence.

Shapes: B images, H x W pixels, patch size P, h = H/P, w = W/P, N = h*w patches, trunk width D, output
width d, Q prompts. `prefix` is the number of class and register tokens per image.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from spar_lightning.backbones.attention import WindowedAttention, attend
from spar_lightning.backbones.low_rank import merged
from spar_lightning.backbones.tiles import Grid as Grid
from spar_lightning.errors import UserError
from spar_lightning.files.hashing import hash_tensors
from spar_lightning.image.resize import Rule, aligned

TextTower = Callable[[Sequence[str]], Tensor]  # prompts -> embeddings (Q, d)


class Backbone(nn.Module, ABC):
    """Base class of backbones: a ViT with dense features in the embedding space of its text encoder.

    A backbone is always in eval mode, also during `fit`: dropout, stochastic depth and coordinate jitter
    would make the student differ from its teacher.

    Attributes:
        family: Name of the class in caches and results; defaults to the class name. It does not contain the
            module path, so that a cache stays valid if the file is renamed.
        patch_size: Patch size P in pixels.
        window: Native image side K in pixels, a multiple of P.
        embed_dim: Output width d.
        mean: Per-channel mean of the input, for pixel values in [0, 1].
        std: Per-channel standard deviation of the input, for pixel values in [0, 1].
        paper_patch_fit: How the published code changes image sides that are not multiples of P.
        packs: Whether `run_blocks` accepts several images of different sizes in one sequence.
        prefix: Number of class and register tokens per image.
        windowable: Whether `run_blocks` calls `attend` for attention, which then can be windowed.
        crops_positions: Whether the positional embedding is a table for larger images than the window, resized to a
            square of which an image uses the top left part (C-RADIO).
        windowed: Settings of windowed attention, set by `with_attention`; None for full attention.
    """

    family: str
    patch_size: int
    window: int
    embed_dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    paper_patch_fit: Rule = staticmethod(aligned)
    packs: bool = True
    prefix: int = 0
    windowable: bool = False
    crops_positions: bool = False
    windowed: WindowedAttention | None = None

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        # A list hides the tower from nn.Module: it is not in the state dict, and Lightning does not move it.
        self._text_tower: list[TextTower] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "family" not in cls.__dict__:
            cls.family = cls.__name__

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Embed normalized images (B, 3, H, W) as tokens (B, prefix+N, D).

        The patch tokens are in row-major order, after the class and register tokens.

        Raises:
            ValueError: H or W is not a multiple of P.
        """

    @abstractmethod
    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        """Run the transformer blocks `start` to `stop - 1` and return tokens of the same shape.

        The result must not depend on how the blocks are split over several calls.

        Args:
            tokens: (B, prefix+N, D), or (1, sum of prefix+N_i, D) for a packed sequence.
            grids: One (h, w) for a batch of images of equal size. Several for a packed sequence, where
                attention must stay within each image (see `attend`).
            start: Index of the first block.
            stop: Index after the last block; None runs all remaining blocks.
        """

    @abstractmethod
    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Remove class and register tokens and project the patch tokens into the text embedding space.

        Returns:
            Features (B, N, d), or (1, sum of N_i, d) for a packed sequence, without L2 normalization.
        """

    @abstractmethod
    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Return the parameters of each group that can be selected for training.

        The names are patch_embed, pos_embed, prefix (class and register tokens), blocks.0, blocks.0.mlp,
        blocks.0.qkv, ..., norm and head. Parameters that do not affect dense features are left out, so
        they are never trained.
        """

    @abstractmethod
    def vision_state_dict(self) -> dict[str, Tensor]:
        """Return the vision weights under the names of the upstream library."""

    @abstractmethod
    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights as returned by `vision_state_dict`.

        Loading is strict: a missing or unexpected tensor, or another shape, must raise an error.
        """

    @abstractmethod
    def build_text_tower(self) -> TextTower:
        """Build the frozen text encoder, a function from prompts to (Q, d); called by the first `encode_text`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Compute softmax(q k' / sqrt(width)) v within each image, with the windows of `with_attention`.

        Args:
            query: Queries (B, heads, prefix+N, width), or (1, heads, sum of prefix+N_i, width) for a packed sequence.
            key: Keys of the same shape.
            value: Values of the same shape.
            grids: Patch grid (h, w) of each image.

        Returns:
            Tokens (B, sum of prefix+N_i, heads * width), for the output projection.
        """
        native = self.window // self.patch_size
        mixed = attend(query, key, value, grids, self.prefix, self.windowed, native)
        return mixed.transpose(1, 2).flatten(2)

    def with_attention(self, windows: WindowedAttention | None) -> Self:
        """Return this network with full (None) or windowed attention. Both share all parameters.

        Raises:
            UserError: The backbone does not support windowed attention, or a setting does not suit its native grid.
        """
        if windows == self.windowed:
            return self
        if windows is not None:
            if not self.windowable:
                raise UserError(
                    f"{type(self).__name__} does not support windowed attention. Allowed: attention: full. To add it, "
                    "call self.attend in run_blocks and set windowable = True in the class."
                )
            windows.sides(self.window // self.patch_size)  # raises for a tile that is too large
        network = copy.copy(self)
        network.windowed, network._text_tower = windows, self._text_tower
        if self._compiled_call_impl is not None:
            network.compile(dynamic=True)
        return network

    def forward(self, images: Tensor) -> Tensor:
        """Return dense features (B, h, w, d) of normalized images (B, 3, H, W)."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        tokens = self.run_blocks(self.embed(images), [grid])
        features: Tensor = self.project(tokens, [grid]).unflatten(1, grid)
        return features

    def trunk_tokens(self, images: Tensor, stop: int | None = None) -> Tensor:
        """Return the tokens (B, prefix+N, D) of normalized images after all blocks, or before block `stop`."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return self.run_blocks(self.embed(images), [grid], stop=stop)

    def final_norm(self) -> nn.Module:
        """Return the norm after the last block, which `spar probe --features trunk` applies.

        Raises:
            UserError: The class does not define it.
        """
        raise UserError(
            f"{type(self).__name__} does not define final_norm, the norm after its last block. Use --features dense, "
            "or define it in the class."
        )

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Return text embeddings (Q, d) of the prompts on the CPU, without L2 normalization.

        Raises:
            UserError: The text encoder returns anything else.
        """
        if not self._text_tower:
            self._text_tower.append(self.build_text_tower())
        embeddings = self._text_tower[0](prompts)
        if error := embedding_error(embeddings, len(prompts), self.embed_dim):
            raise UserError(f"{type(self).__name__}: the text encoder {error}. Correct build_text_tower in the class.")
        return embeddings

    def text_identity(self) -> dict[str, Any] | None:
        """Return the cache key of the text embeddings; None disables their cache on disk.

        The key must contain everything that the embeddings depend on: names that always refer to the same
        weights, or hashes of files, and the tokenizer if it can be chosen.
        """
        return None

    def random_weights(self) -> str | None:
        """Return None, or for a backbone that was built with random weights, a sentence on how to set others."""
        return None

    def licence(self) -> str:
        """Return the license of the base weights and its conditions for distributing a student, in Markdown."""
        return "Unknown. The license of the base weights applies, because a student is a derivative work of them."

    def hub_metadata(self) -> dict[str, str]:
        """Return `base_model`, `license` and, for license: other, `license_name` and `license_link`, as far as known.

        They become metadata of the model card on the Hugging Face Hub.
        """
        return {}

    def attention_identity(self) -> dict[str, Any] | None:
        """Return the cache key of windowed attention, or None for full attention."""
        return None if self.windowed is None else self.windowed.identity(self.window // self.patch_size)

    def drop_text_tower(self) -> None:
        """Free the text encoder; the next `encode_text` builds it again."""
        self._text_tower.clear()

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize uint8 images (..., 3, H, W) with `mean` and `std`, in the dtype of the parameters."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return ((images.float() / 255 - mean) / std).to(next(self.parameters()).dtype)

    def denormalize(self, images: Tensor) -> Tensor:
        """Convert normalized images (..., 3, H, W) to fp32 pixel values in [0, 1]."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return images.float() * std + mean

    def weights_digest(self) -> str:
        """Return the SHA-256 hash of the names, dtypes, shapes and values of the vision weights."""
        return hash_tensors(merged(self.vision_state_dict()))

    def identity(self) -> dict[str, Any]:
        """Return the cache key of the dense features; subclasses add settings that the weights do not contain."""
        return {
            "family": self.family,
            "weights": self.weights_digest(),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return sum(name.count(".") == 1 for name in self.parameter_groups() if name.startswith("blocks."))

    def train(self, mode: bool = True) -> "Backbone":
        """Keep eval mode; `mode` is ignored."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a backbone do not contain the text tower.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_text_tower": []}


def embedding_error(embeddings: Any, prompts: int, width: int) -> str | None:
    """Return how text embeddings differ from floating-point numbers (prompts, width), or None."""
    if isinstance(embeddings, Tensor) and embeddings.is_floating_point() and embeddings.shape == (prompts, width):
        return None
    found = type(embeddings).__name__
    if isinstance(embeddings, Tensor):
        found = f"a tensor of {embeddings.dtype} with shape {tuple(embeddings.shape)}"
    return f"returned {found} for {prompts} prompts, expected floating-point numbers with shape ({prompts}, {width})"
