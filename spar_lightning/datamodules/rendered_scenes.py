"""RenderedScenes: an SA1B data module with synthetic images, which are written as tar files on first use.

This is the data of the quickstart. Plan, cache, training and validation use the same code as real SA-1B shards; this
module only adds the writing of the files.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
import yaml
from PIL import Image
from tqdm import tqdm

from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.datasets.scene_renderer import CLASSES, render
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.feature_cache.extract import Dtype
from spar_lightning.files.atomic import new_folder
from spar_lightning.files.home import expand_home

IMAGES_PER_TAR = 256
MIN_CANVAS = 8  # px
FORMAT = 3  # version of the images and of the folder's layout
VALIDATION = 1_000_000  # index of the first validation image; training images are counted from 1


class RenderedScenes(SA1B):
    """Synthetic images rendered from a seed: training shards in SA-1B's layout, and labeled validation sets.

    Args:
        root: Folder for the synthetic images and their features, with a subfolder for each seed.
        augmentation: Random resize, crop and flip, drawn once per image: a preset, and options that override it.
        cached: Cache the teacher's features on disk; if false, the teacher runs in each training step.
        cache_dtype: Precision of the cached features, see SA1B.
        train_scenes: Number of unlabeled training images.
        train_canvas: Smallest and largest side of a training image in pixels.
        val_scenes: Number of labeled validation images for each size in val_sizes.
        val_sizes: Sides of the square validation images in pixels; one validation set per size.
        batch_size: Images per step and device.
        num_workers: Loader processes per device, for training and for validation each; 0 loads in the main process.
        seed: Seed of the images, of the augmentation and of the order of training.
        cache_activations: Also cache the activations that enter the first trainable block, so that a step reads no
            image.
        pack_tokens: Sequence packing: maximum number of patches in a step, as many images as fit, instead of
            batch_size; null uses batch_size.

    Raises:
        UserError: If a number is outside its range.
    """

    def __init__(
        self,
        root: str = "data/scenes",
        augmentation: Augmentation = Augmentation("small"),
        cached: bool = True,
        cache_dtype: Dtype = "float16",
        train_scenes: int = 500,
        train_canvas: tuple[int, int] = (128, 208),
        val_scenes: int = 100,
        val_sizes: Sequence[int] = (64, 192),
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        cache_activations: bool = False,
        pack_tokens: int | None = None,
    ) -> None:
        check_at_least(1, train_scenes=train_scenes, val_scenes=val_scenes)
        check_at_least(MIN_CANVAS, **{"train_canvas": train_canvas[0], "val_sizes": min(val_sizes, default=None)})
        check_at_least(train_canvas[0], **{"the larger side of train_canvas": train_canvas[1]})
        self.folder = Path(expand_home(root)) / f"seed-{seed}"
        self.train_scenes, self.train_canvas = train_scenes, tuple(train_canvas)
        self.val_scenes, self.val_sizes = val_scenes, tuple(val_sizes)
        tars = -(-train_scenes // IMAGES_PER_TAR)
        super().__init__(
            shards=[str(self.folder / "train" / f"sa_{i:06d}.tar") for i in range(tars)],
            cache=str(self.folder / "cache") if cached else None,
            cache_dtype=cache_dtype,
            augmentation=augmentation,
            benchmarks=[str(self.folder / f"scenes_{size}") for size in self.val_sizes],
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_activations=cache_activations,
            pack_tokens=pack_tokens,
        )

    def shorten(self, steps: int, folder: Path) -> None:
        super().shorten(steps, folder)
        assert self.max_images is not None
        self.folder, self.train_scenes, self.val_sizes = folder / "scenes", self.max_images, ()
        self.shards = [str(self.folder / "train" / "sa_000000.tar")]

    def prepare_data(self) -> None:
        """Render the images unless this seed's folder exists."""
        self.draw()

    def draw(self) -> None:
        """Write the tar files and validation sets unless they exist.

        Raises:
            UserError: If the folder contains images of other settings.
        """
        wanted = {
            "format": FORMAT,
            "seed": self.seed,
            "train_scenes": self.train_scenes,
            "train_canvas": list(self.train_canvas),
            "val_scenes": self.val_scenes,
            "val_sizes": list(self.val_sizes),
        }
        description = self.folder / "scenes.json"
        if not description.exists():
            self._draw(wanted)
        found = json.loads(description.read_text())
        other = [f"{k} {found.get(k)} instead of {v}" for k, v in wanted.items() if found.get(k) != v]
        if other:
            raise UserError(
                f"{self.folder} contains images of other settings: {', '.join(other)}. Restore these settings, use "
                "another data.root, or delete the folder."
            )

    def _draw(self, wanted: dict[str, object]) -> None:
        """Write all files to a temporary folder, then rename it."""
        try:
            with new_folder(self.folder) as unfinished:
                self._write(unfinished, wanted)
        except OSError:
            if not self.folder.is_dir():  # otherwise another process has written the same images
                raise

    def _write(self, unfinished: Path, wanted: dict[str, object]) -> None:
        (unfinished / "train").mkdir()
        total = self.train_scenes + self.val_scenes * len(self.val_sizes)
        bar: tqdm[Any]
        with tqdm(total=total, desc="rendering images", unit="image") as bar:
            self._write_tars(unfinished / "train", bar)
            for size in self.val_sizes:
                self._write_benchmark(unfinished / f"scenes_{size}", size, bar)
        (unfinished / "scenes.json").write_text(json.dumps(wanted, indent=2) + "\n")

    def _write_tars(self, folder: Path, bar: "tqdm[Any]") -> None:
        low, high = self.train_canvas
        for first in range(0, self.train_scenes, IMAGES_PER_TAR):
            path = folder / f"sa_{first // IMAGES_PER_TAR:06d}.tar"
            with wds.TarWriter(str(path), encoder=False, mtime=0.0) as tar:
                for image_id in range(first + 1, min(first + IMAGES_PER_TAR, self.train_scenes) + 1):
                    rng = np.random.default_rng([self.seed, image_id])
                    height, width = (int(side) for side in rng.integers(low, high, size=2, endpoint=True))
                    image = render(self.seed, image_id, height, width).image
                    tar.write(
                        {"__key__": f"sa_{image_id}", "jpg": _jpeg(image), "json": _json(image_id, height, width)}
                    )
                    bar.update()

    def _write_benchmark(self, folder: Path, size: int, bar: "tqdm[Any]") -> None:
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True)
        classes = [{"label": name, "names": [name]} for name in CLASSES]
        (folder / "benchmark.yaml").write_text(yaml.safe_dump({"classes": classes}, sort_keys=False))
        for i in range(self.val_scenes):
            scene = render(self.seed, VALIDATION + i, size, size)
            Image.fromarray(scene.image).save(folder / "images" / f"{i:04d}.png", compress_level=1)
            Image.fromarray(scene.labels).save(folder / "labels" / f"{i:04d}.png", compress_level=1)
            bar.update()


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=95, subsampling=0)
    return buffer.getvalue()


def _json(image_id: int, height: int, width: int) -> bytes:
    """Return the JSON file that SA-1B stores next to every image, without masks."""
    image = {"image_id": image_id, "width": width, "height": height, "file_name": f"sa_{image_id}.jpg"}
    return json.dumps({"image": image, "annotations": []}).encode()
