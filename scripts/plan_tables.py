"""Disk and time of SigLIP2 features for each augmentation, by `spar cache --plan-only`.

    python scripts/plan_tables.py --windows-per-second 163

The images are blank, in the sizes of SA-1B: 1500 pixels on the short side, aspect ratios mixed as there. Only
their sizes matter to a plan. Without a rate the one of this machine is measured.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from spar_lightning.cli import main as spar

CONFIG = Path(__file__).parents[1] / "spar_lightning" / "configs" / "siglip2_vitb16.yaml"
ASPECTS, SHARES = (1.5, 4 / 3, 16 / 9, 1.0), (0.62, 0.22, 0.10, 0.06)  # long side to short side


def write_tar(path: Path, count: int) -> None:
    """Blank JPEG images, a third of them upright."""
    rng = np.random.default_rng(0)
    blank: dict[tuple[int, int], bytes] = {}
    with wds.TarWriter(str(path), encoder=False) as tar:
        for i in range(count):
            size = (round(1500 * rng.choice(ASPECTS, p=SHARES)), 1500)
            size = size[::-1] if rng.uniform() < 1 / 3 else size
            if size not in blank:
                buffer = io.BytesIO()
                Image.new("RGB", size).save(buffer, "jpeg")
                blank[size] = buffer.getvalue()
            tar.write({"__key__": f"sa_{i + 1}", "jpg": blank[size]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows-per-second", default="null")
    parser.add_argument("--images", type=int, default=2000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plan_tables-") as place:
        write_tar(Path(place) / "sa_000000.tar", given.images)
        for augmentation in ("released", "text", "extended"):
            print(f"\n## {augmentation}\n", flush=True)
            code = spar([
                "cache", "--config", str(CONFIG), "--plan-only", "--windows-per-second", given.windows_per_second,
                "--model.backbone.pretrained", "null", "--data.shards", f"{place}/sa_000000.tar",
                "--data.max_images", "null", "--data.cache", f"{place}/{augmentation}",
                "--data.augmentation", augmentation, "--trainer.precision", "32-true", "--data.prefix", "true",
            ])  # fmt: skip
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
