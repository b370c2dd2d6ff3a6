"""Class names to text embeddings, and dense features to label maps.

A class may have several names (prompt synonyms); its score is the largest cosine of any of them.
argmax over classes of the maximum over names is the owner of the best name, so a label map needs no
C x H x W tensor: names are upsampled in chunks and only the running best is kept.

Shapes: Q names, C classes, h x w patches, H x W pixels, d channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATES = ("a photo of a {}.",)

Classes = Sequence[str] | Mapping[str, Sequence[str]]


def embed_names(
    encode_text: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One unit vector per name (Q, d): normalised prompts, averaged over the templates, normalised again."""
    embeddings = []
    for name in names:
        prompts = encode_text([template.format(name) for template in templates])  # (templates, d)
        embeddings.append(F.normalize(prompts.float(), dim=-1).mean(0))
    return F.normalize(torch.stack(embeddings), dim=-1)


@dataclass(frozen=True)
class TextClassifier:
    """The text side of a segmentation task.

    Attributes:
        labels: Name of each class, for people (C).
        embeddings: Unit vectors of all names (Q, d).
        owner: Class of each name (Q).
    """

    labels: tuple[str, ...]
    embeddings: Tensor
    owner: Tensor

    @classmethod
    def from_classes(
        cls,
        encode_text: Callable[[Sequence[str]], Tensor],
        classes: Classes,
        templates: Sequence[str] = TEMPLATES,
    ) -> "TextClassifier":
        """Encode class names: a list of names, or a mapping from label to its names."""
        by_label = classes if isinstance(classes, Mapping) else {name: (name,) for name in classes}
        names = [name for group in by_label.values() for name in group]
        owner = [i for i, group in enumerate(by_label.values()) for _ in group]
        return cls(tuple(by_label), embed_names(encode_text, names, templates), torch.tensor(owner))

    def label_map(self, features: Tensor, size: tuple[int, int], chunk: int = 32) -> Tensor:
        """Class of every pixel (H, W) int64, from features (h, w, d) upsampled bilinearly as cosines.

        Args:
            features: Dense features of one image, not normalised.
            size: Height and width of the label map in pixels.
            chunk: Names per step; memory is bounded by chunk x H x W floats.
        """
        embeddings, owner = self.embeddings.to(features.device), self.owner.to(features.device)
        unit = F.normalize(features.float(), dim=-1)
        best = torch.full(size, -torch.inf, device=features.device)
        labels = torch.zeros(size, dtype=torch.long, device=features.device)
        for first in range(0, len(embeddings), chunk):
            with torch.autocast(features.device.type, enabled=False):  # close classes differ by less than bf16 holds
                cosines = torch.einsum("hwd,qd->qhw", unit, embeddings[first : first + chunk])
            pixels = F.interpolate(cosines[None], size, mode="bilinear", align_corners=False)[0]  # (chunk, H, W)
            score, name = pixels.max(0)
            better = score > best
            best = torch.where(better, score, best)
            labels = torch.where(better, owner[first + name], labels)
        return labels
