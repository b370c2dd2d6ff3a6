"""`spar speed teacher`: stitched features of an image, compared with the network alone and the published procedure."""

from collections.abc import Iterator
from typing import Final

import torch

from spar_lightning.errors import UserError
from spar_lightning.sliding_window import window_starts
from spar_lightning.speed import published
from spar_lightning.speed.bench import Bench, operations
from spar_lightning.speed.comparison import Comparison

ROWS, COLUMNS = 2, 3  # windows on a CPU, so that the image is larger than a window along both axes
IMAGE: Final = (768, 1152)  # height and width on an accelerator: about the mean size in the released configuration


def teacher(bench: Bench) -> Iterator[Comparison]:
    """Compare the teacher with the network alone, which gets the same windows, cut beforehand, in the same batches."""
    module = bench.module
    if module.teacher == "single":
        raise UserError("spar speed teacher measures sliding windows, but model.teacher is single. Set it to sliding.")
    windows = module.build_teacher()
    backbone, window, stride, patch = module.student, windows.window, module.config.stride, module.student.patch_size
    height, width = IMAGE
    if bench.device.type == "cpu":
        height, width = (window + (n - 1) * stride // patch * patch for n in (ROWS, COLUMNS))
    image = backbone.normalize(bench.noise(height, width))
    tops, lefts = (window_starts(side, window, stride) for side in (height, width))
    k, l = min(window, height), min(window, width)
    cut = torch.stack([image[:, y : y + k, x : x + l] for y in tops for x in lefts])
    batches = cut.split(windows.windows_at_once(bench.device))

    @torch.no_grad()
    def alone() -> None:
        for batch in batches:
            windows.backbone(batch)

    @torch.no_grad()
    def stitched() -> None:
        windows(image[None])

    with torch.no_grad():
        flops = len(cut) * operations(backbone, lambda net, meta: net(torch.zeros(1, 3, k, l, device=meta)))
    ours, bare = f"ours, {bench.precision}", f"network alone, {bench.precision}"
    plain = bench.student()  # the published procedure is not compiled, even if ours is
    ways = {
        **bench.published(lambda: published.teacher_features(plain, image, stride), flops),
        ours: bench.way(stitched, flops),
        bare: bench.way(alone, flops),
    }
    title = f"teacher on {height} x {width}, stride {stride}"
    yield bench.compare(title, "windows", len(cut), ways, (ours, bare))
