"""Pretrain the `Tiny` backbone and write the two files that ship in the package.

As real vision-language models, it is trained at one fixed resolution, on random 64 x 64 crops of synthetic images.
Each patch token is aligned with the text embeddings of the classes in the patch. The loss is the cross-entropy over
the class names in random prompt templates; the target is the fraction of each class in the patch. The seed is fixed.
Pretraining takes about 8 minutes on two CPU cores. 6,000 steps make the network 3 points better (docs/quickstart.md).

    python scripts/pretrain_tiny.py            # writes spar_lightning/backbones/tiny.safetensors
"""

import argparse
import re
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES
from safetensors.torch import save_file
from torch import Tensor

from spar_lightning.backbones.tiny import Tiny, WordEncoder
from spar_lightning.datasets.scene_renderer import CLASSES, render

PACKAGE = Path(__file__).parents[1] / "spar_lightning" / "backbones"
SEED = 20260  # seed of the pretraining images; not used anywhere else in the project
CANVAS = 192
TEMPLATES = ["{}", *(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)]


def vocabulary() -> list[str]:
    """Return all words of the class names and of the prompt templates, sorted."""
    texts = [*CLASSES, *TEMPLATES]
    return sorted({word for text in texts for word in re.findall(r"\w+", text.lower())})


def render_bank(scenes: int) -> tuple[Tensor, Tensor]:
    """Return synthetic images (n, 3, 192, 192) and labels (n, 192, 192), uint8."""
    draw = partial(render, SEED, height=CANVAS, width=CANVAS)
    images = torch.empty(scenes, 3, CANVAS, CANVAS, dtype=torch.uint8)
    labels = torch.empty(scenes, CANVAS, CANVAS, dtype=torch.uint8)
    with ProcessPoolExecutor(2) as pool:
        for i, scene in enumerate(pool.map(draw, range(scenes), chunksize=16)):
            images[i] = torch.from_numpy(scene.image).permute(2, 0, 1)
            labels[i] = torch.from_numpy(scene.labels)
    return images, labels


def crops(images: Tensor, labels: Tensor, batch: int, side: int) -> tuple[Tensor, Tensor]:
    """Return a batch of random crops and their labels, mirrored with probability 0.5."""
    picks = torch.randint(len(images), (batch,)).tolist()
    corners = torch.randint(CANVAS - side + 1, (batch, 2)).tolist()
    views = [(n, slice(y, y + side), slice(x, x + side)) for n, (y, x) in zip(picks, corners, strict=True)]
    image = torch.stack([images[n, :, rows, columns] for n, rows, columns in views])
    label = torch.stack([labels[n, rows, columns] for n, rows, columns in views])
    mirrored = torch.rand(batch) < 0.5
    image[mirrored], label[mirrored] = image[mirrored].flip(-1), label[mirrored].flip(-1)
    return image, label


def patch_shares(labels: Tensor, patch: int) -> Tensor:
    """Return the fraction of each class in each patch: (B, H, W) -> (B, h, w, C)."""
    one_hot = F.one_hot(labels.long(), len(CLASSES)).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(one_hot, patch).permute(0, 2, 3, 1)


def prompts() -> list[str]:
    """Return the prompts of all classes in one random template."""
    template = TEMPLATES[int(torch.randint(len(TEMPLATES), ()))]
    return [template.format(name) for name in CLASSES]


def main() -> None:
    """Pretrain and write the vocabulary and the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PACKAGE / "tiny.safetensors")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    (PACKAGE / "tiny_words.txt").write_text("\n".join(vocabulary()) + "\n", encoding="ascii")

    start = time.perf_counter()
    images, labels = render_bank(args.scenes)
    print(f"{args.scenes} synthetic images in {time.perf_counter() - start:.0f} s", flush=True)

    vision = Tiny(pretrained=None)
    text = WordEncoder(vision.embed_dim, vision.heads, depth=1)
    log_scale = torch.nn.Parameter(torch.tensor(2.3))
    parameters = [*vision.parameters(), *text.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)

    for step in range(1, args.steps + 1):
        image, label = crops(images, labels, args.batch, vision.window)
        features = F.normalize(vision(vision.normalize(image)), dim=-1)
        logits = log_scale.exp() * features @ F.normalize(text(prompts()), dim=-1).T  # (B, h, w, C)
        shares = patch_shares(label, vision.patch_size)
        loss = F.cross_entropy(logits.flatten(0, 2), shares.flatten(0, 2))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps:
            accuracy = (logits.argmax(-1) == shares.argmax(-1)).float().mean()
            rate = step / (time.perf_counter() - start)
            left = (args.steps - step) / rate / 60
            print(
                f"step {step} loss {loss:.3f} accuracy {accuracy:.3f} {rate:.1f} steps/s {left:.0f} min left",
                flush=True,
            )
        if step % 1000 == 0 or step == args.steps:
            towers = {"vision.": vision.vision_state_dict(), "text.": text.state_dict()}
            save_file({p + k: v.contiguous() for p, tower in towers.items() for k, v in tower.items()}, args.out)
    print(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
