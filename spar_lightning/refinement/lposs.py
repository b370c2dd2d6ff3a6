"""LPOSS: propagation of class scores between patches that look alike and are close to each other.

Label Propagation Over Patches for Open-vocabulary Semantic Segmentation (CVPR 2025, arXiv 2503.19777), in plain
PyTorch. Each patch is connected to its k most similar patches. The scores Z solve (I - alpha W) Z = Y, where Y are the
similarities and W is the normalized graph. The graph is built as a sparse matrix: it needs k entries per patch, never
an N x N matrix.

Shapes: N = h*w patches, d channels, Q names.
"""

import math
import warnings
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.refinement.base import BAND, Refinement

TOLERANCE: Final = 1e-6  # residual relative to the similarities of a name


Preset = Literal["pretrained", "spar"]
PRESETS: Final[dict[Preset, dict[str, float]]] = {
    "pretrained": {"gamma": 1.0, "alpha": 0.95, "k": 400, "sigma": 0.01},
    "spar": {"gamma": 10.0, "alpha": 0.95, "k": 400, "sigma": 0.01},
}


class LPOSS(Refinement):
    """Refinement by label propagation over patches.

    Args:
        preset: Default values of gamma, alpha, k and sigma: `pretrained` (gamma 1, in the paper for pretrained
            networks and sliding windows) or `spar` (gamma 10, in the paper for its student).
        gamma: Exponent of the cosine similarity of two patches, above 0. Larger values favor the most similar patches.
            null uses the preset.
        alpha: Share of a patch's score that comes from its neighbors, at least 0 and below 1; null uses the preset.
            The condition number of the linear system grows as 1 / (1 - alpha).
        k: Number of neighbors of a patch, including itself; null uses the preset. An image with fewer patches uses
            all patches.
        sigma: Decay of the affinity per pixel of distance between two patches in the network's input, at least 0; null
            uses the preset.

    Raises:
        UserError: If a value is out of range.
    """

    def __init__(
        self,
        preset: Preset = "pretrained",
        gamma: float | None = None,
        alpha: float | None = None,
        k: int | None = None,
        sigma: float | None = None,
    ) -> None:
        if preset not in PRESETS:
            raise UserError(f"refine: LPOSS does not have a preset {preset!r}. Allowed: {', '.join(PRESETS)}.")
        given = {"gamma": gamma, "alpha": alpha, "k": k, "sigma": sigma}
        settings = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
        self.gamma, self.alpha, self.sigma = settings["gamma"], settings["alpha"], settings["sigma"]
        self.k = int(settings["k"])
        if not self.gamma > 0 or not 0 <= self.alpha < 1 or self.k < 1 or not self.sigma >= 0:
            raise UserError(
                f"refine: gamma must be above 0, alpha at least 0 and below 1, k at least 1, and sigma at least 0, but "
                f"got {settings}."
            )

    def identity(self) -> dict[str, Any]:
        return {"name": "LPOSS", "gamma": self.gamma, "alpha": self.alpha, "k": self.k, "sigma": self.sigma}

    @torch.no_grad()
    def __call__(self, features: Tensor, similarities: Tensor, patch_size: int) -> Tensor:
        """Return refined scores (Q, h, w) in fp32 or higher, up to 1 / (1 - alpha) times the similarities."""
        with torch.autocast(similarities.device.type, enabled=False):
            dtype = torch.promote_types(similarities.dtype, torch.float32)
            graph = self.graph(F.normalize(features.to(dtype), dim=-1), patch_size)
            scores = similarities.to(dtype).flatten(1).T.contiguous()  # (N, Q)
            refined: Tensor = self._solve(graph, scores).T.unflatten(1, similarities.shape[1:])
            return refined

    def graph(self, unit: Tensor, patch_size: int) -> Tensor:
        """Return the normalized affinities of unit vectors (h, w, d), a sparse matrix (N, N)."""
        height, width = unit.shape[:2]
        nodes, count = unit.flatten(0, 1), height * width
        index = torch.arange(count, device=unit.device)
        places = patch_size * torch.stack([index // width, index % width], dim=-1).to(unit)  # (N, 2), pixels
        values, columns = [], []
        for rows in index.split(max(1, BAND // count)):
            similarity, nearest = (nodes[rows] @ nodes.T).topk(min(self.k, count))
            distance = (places[rows, None] - places[nearest]).norm(dim=-1)
            values.append(similarity.clamp(min=0) ** self.gamma * (-self.sigma * distance).exp())
            columns.append(nearest)
        value, column = torch.cat(values), torch.cat(columns)
        row = index[:, None].expand_as(column)
        others = row != column
        one_way = torch.stack([row[others], column[others]])
        both_ways = torch.cat([one_way, one_way.flip(0)], dim=1)
        weights = torch.cat([value[others]] * 2)
        degree = torch.zeros(count, device=unit.device, dtype=unit.dtype).index_add_(0, both_ways[0], weights)
        degree[degree == 0] = 1  # a patch without neighbors keeps its scores
        scale = degree.rsqrt()
        weights = scale[both_ways[0]] * weights * scale[both_ways[1]]
        graph = torch.sparse_coo_tensor(both_ways, weights, (count, count), check_invariants=False).coalesce()
        with warnings.catch_warnings():  # CSR is a beta feature, but halves the time of products
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return graph.to_sparse_csr()

    def _solve(self, graph: Tensor, scores: Tensor) -> Tensor:
        """Solve (I - alpha graph) Z = scores (N, Q) by conjugate gradients, with separate step sizes per column."""
        solution = torch.zeros_like(scores)
        residual = scores.clone()
        direction = scores.clone()
        squared = residual.square().sum(0)  # (Q)
        goal = TOLERANCE**2 * squared
        # The eigenvalues of the graph are in [-1, 1]. This bounds the condition number and the number of steps.
        condition = (1 + self.alpha) / (1 - self.alpha)
        enough = math.ceil(0.5 * math.sqrt(condition) * math.log(2 * math.sqrt(condition) / TOLERANCE))
        for _ in range(enough):
            if (squared <= goal).all():
                break
            image = direction - self.alpha * (graph @ direction)
            step = _ratio(squared, (direction * image).sum(0))
            solution += step * direction
            residual -= step * image
            before, squared = squared, residual.square().sum(0)
            direction = residual + _ratio(squared, before) * direction
        return solution


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the quotient, or 0 for columns that are already solved exactly."""
    return torch.where(below > 0, above / below, below)
