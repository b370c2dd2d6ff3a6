"""Pretrain a second small network from image-level labels, to test the method on more than one network.

The trunk is that of `Tiny`. As SigLIP2, it never sees where a class is: an attention pool averages the patch features
of a crop, and a sigmoid loss compares the average with the text embedding of each class name; the target is which
classes are in the crop. The patch features, which segmentation uses, are the values of the pool. The weights do not
ship; `scripts/measure_attention.py` and `spar fit --model.backbone.pretrained` read the file.

    python -m scripts.pretrain_image_level     # about 45 minutes with one thread, --threads 1
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.pretrain_tiny import SEED, crops, patch_shares, prompts, render_bank
from spar_lightning.backbones.tiny import Tiny, WordEncoder

OUT = Path(__file__).parents[1] / "runs" / "measured" / "image-level.safetensors"


class AttentionPool(nn.Module):
    """Weighted mean of patch features, with one learned query."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))  # the mean of all patches at the start
        self.key = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Pool features: (B, h, w, d) -> (B, d)."""
        patches = features.flatten(1, 2)
        weights = (self.key(patches) @ self.query / patches.shape[-1] ** 0.5).softmax(1)  # (B, N)
        return torch.einsum("bn,bnd->bd", weights, patches)


def main() -> None:
    """Pretrain and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    images, labels = render_bank(args.scenes)
    vision = Tiny(pretrained=None)
    text = WordEncoder(vision.embed_dim, vision.heads, depth=1)
    pool = AttentionPool(vision.embed_dim)
    bias = nn.Parameter(torch.tensor(-0.5))
    parameters = [*vision.parameters(), *text.parameters(), *pool.parameters(), bias]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=0.02, betas=(0.9, 0.98))
    # A warm-up of 200 steps, a constant rate, and a linear decay to 0 in the second half.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 200, 1.0, 2 * (1 - step / args.steps))
    )

    for step in range(1, args.steps + 1):
        image, label = crops(images, labels, args.batch, vision.window)
        pooled = pool(vision(vision.normalize(image)))
        logits = pooled @ F.normalize(text(prompts()), dim=-1).T + bias  # (B, C)
        present = patch_shares(label, vision.window)[:, 0, 0] > 0
        loss = F.binary_cross_entropy_with_logits(logits, present.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps:
            accuracy = ((logits > 0) == present).float().mean()
            left = (args.steps - step) * (time.perf_counter() - start) / step / 60
            print(f"step {step} loss {loss:.3f} accuracy {accuracy:.3f} {left:.0f} min left", flush=True)
        if step % 1000 == 0 or step == args.steps:
            towers = {"vision.": vision.vision_state_dict(), "text.": text.state_dict()}
            save_file({p + k: v.contiguous() for p, tower in towers.items() for k, v in tower.items()}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
