"""The interface of a backbone: what the other modules need of a vision-language ViT.

A plugin author subclasses `Backbone` and fills in the abstract methods. The pass through the
network is cut in three (`embed`, `run_blocks`, `project`) so that the frozen part of a student can
be computed once and kept, and so that images of different sizes can travel in one sequence.

Shapes: B images, H x W pixels, P patch size, h = H/P, w = W/P, N = h*w, D width of the trunk,
d width of the output, Q prompts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spar_lightning.files.hashing import hash_tensors
from spar_lightning.image.resize import Rule, aligned

Grid = tuple[int, int]  # patches of an image (h, w)
TextTower = Callable[[Sequence[str]], Tensor]


class Backbone(nn.Module, ABC):
    """A ViT that gives dense features in the space of its text encoder.

    Always in eval mode, also inside `fit`: dropout, stochastic depth and coordinate jitter would
    make the student differ from its teacher.

    Attributes:
        family: Name that identifies the class in caches and results. It defaults to the class's name and never
            contains the module path: a renamed file must not orphan a cache.
        patch_size: Side P of a patch in pixels.
        window: Native side K of the image in pixels, a multiple of P.
        embed_dim: Width d of the output.
        mean: Per-channel mean of the input, for pixels in [0, 1].
        std: Per-channel standard deviation of the input.
        paper_patch_fit: What the published code does with sides that the patch does not divide.
        packs: Whether `run_blocks` takes several images of different sizes in one sequence.
    """

    family: str
    patch_size: int
    window: int
    embed_dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    paper_patch_fit: Rule = staticmethod(aligned)
    packs: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        # A list, so that the tower is no submodule: not in the state dict, not moved by Lightning.
        self._text_tower: list[TextTower] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "family" not in cls.__dict__:
            cls.family = cls.__name__

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Turn normalised images (B, 3, H, W), sides multiples of P, into tokens (B, prefix+N, D)."""

    @abstractmethod
    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        """Run blocks start..stop-1 on tokens of the same shape as `embed` gives.

        Args:
            tokens: (B, prefix+N, D), or for a pack (1, sum of prefix+N_i, D).
            grids: One (h, w) for a batch of equal size; several for a pack, attention kept inside each image.
            start: First block to run.
            stop: Block to stop before; None runs to the end. Splitting anywhere changes nothing.
        """

    @abstractmethod
    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Drop prefix tokens and project the others into the text space: (B, tokens, d), not normalised."""

    @abstractmethod
    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Name the parts: patch_embed, pos_embed, prefix, blocks.0 .., blocks.0.mlp, blocks.0.qkv, norm, head.

        Parameters that take no part in dense features are left out: they can never be trained.
        """

    @abstractmethod
    def vision_state_dict(self) -> dict[str, Tensor]:
        """The weights in the names of the library that they come from."""

    @abstractmethod
    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load what `vision_state_dict` gave, strictly."""

    @abstractmethod
    def build_text_tower(self) -> TextTower:
        """Make the frozen text encoder, prompts -> (Q, d); called at the first `encode_text`."""

    def forward(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, d) of normalised images (B, 3, H, W)."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        tokens = self.run_blocks(self.embed(images), [grid])
        features: Tensor = self.project(tokens, [grid]).unflatten(1, grid)
        return features

    def trunk_tokens(self, images: Tensor, stop: int | None = None) -> Tensor:
        """Tokens (B, prefix+N, D) of normalised images behind the blocks, or before block `stop`."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return self.run_blocks(self.embed(images), [grid], stop=stop)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (Q, d) of the prompts, not normalised, on the CPU."""
        if not self._text_tower:
            self._text_tower.append(self.build_text_tower())
        return self._text_tower[0](prompts)

    def text_identity(self) -> dict[str, Any] | None:
        """What text embeddings depend on, so that they can be kept on disk; None keeps nothing.

        Names that stand for the same weights for ever, or digests of files, with the tokenizer where it is chosen.
        """
        return None

    def licence(self) -> str:
        """Licence of the pretrained weights and what it asks of those who pass a student on, in Markdown."""
        return "Not known to spar_lightning: that of the base weights, of which a student is a derivative."

    def drop_text_tower(self) -> None:
        """Free the text encoder; the next `encode_text` builds it again."""
        self._text_tower.clear()

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 images (..., 3, H, W) into what `embed` takes."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return ((images.float() / 255 - mean) / std).to(next(self.parameters()).dtype)

    def denormalize(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1], fp32, of normalised images (..., 3, H, W)."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return images.float() * std + mean

    def weights_digest(self) -> str:
        """sha256 over names, types, shapes and bytes of the vision weights."""
        return hash_tensors(self.vision_state_dict())

    def identity(self) -> dict[str, Any]:
        """What dense features depend on; a family adds what its weights do not show."""
        return {
            "family": self.family,
            "weights": self.weights_digest(),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(name.count(".") == 1 for name in self.parameter_groups() if name.startswith("blocks."))

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode, whatever the loop asks."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        # Neither a copied student nor a pickled one carries the text tower along.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_text_tower": []}
