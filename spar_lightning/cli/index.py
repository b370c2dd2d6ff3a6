"""`spar index`: dense features of images, stored for `spar query`."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from spar_lightning.cli.backbone_arguments import split_backbone_arguments
from spar_lightning.cli.blocks import block_bar
from spar_lightning.cli.error_messages import out_of_memory
from spar_lightning.cli.parser import Parser
from spar_lightning.datasets.image_source import is_image
from spar_lightning.datasets.shard_index import scan_all
from spar_lightning.errors import UserError
from spar_lightning.feature_cache.extract import Dtype
from spar_lightning.feature_cache.shard import CacheError
from spar_lightning.feature_index import Origin, WritableIndex
from spar_lightning.feature_index.parts import complete, image_of
from spar_lightning.files.walk import files_below
from spar_lightning.formatting import bytes_text
from spar_lightning.refinement.anyup import BILINEAR
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.stopping import Stopped
from spar_lightning.student import load_student, usable_device

DESCRIPTION = """Compute the dense features of images once and store them, so that `spar query` finds and segments any
classes in them without running the network again.

The command can be stopped and started again at any time, and be started several times, also on several machines with a
shared folder: the processes share the work. New images are added when it is started again. Images that cannot be read
are listed at the end, and the exit code is then 1.

Images have one of the suffixes jpg, jpeg, png, webp, bmp, tif and tiff."""
# They follow `spar fit --config quickstart`.
EXAMPLES = (
    "spar index data/scenes/seed-0/scenes_192/images --weights runs/quickstart --out runs/index",
    "spar index photos --weights runs/siglip2_vitb16 --out runs/photos --dtype int8",
)
# Settings that affect the features.
SETTINGS: Final = ("inference", "stride", "window_batch", "blend", "attention", "patch_fit", "block_size")


def parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser("spar index", description=DESCRIPTION, default_env=False)
    parser.usage_line = "IMAGES [IMAGES ...] --weights WEIGHTS --out FOLDER [options]"
    parser.examples = EXAMPLES
    add = parser.add_argument
    add("images", nargs="+", type=str, help="Folder of images, with all subfolders, or one or several tar files")
    add("--weights", required=True, type=str, help="Run folder, checkpoint, export, hf-hub:org/name, weight file "
        "together with --config, or name of a backbone such as siglip2")  # fmt: skip
    add("--out", required=True, type=str, help="Folder of the index")
    add("--config", type=str, help="YAML file of the run, if the weights do not name their network")
    add("--max_side", type=int | None, default=1024, help="Largest long side of the network input, in pixels: larger "
        "images are resized; null: no limit, also by default with --block_size")  # fmt: skip
    add("--dtype", type=Dtype, default="float16", help="Precision of the stored features; int8 has an error below 1 %")
    add("--device", type=str, help="Device such as cpu, cuda or cuda:1; a GPU by default, if available")
    others = set(InferenceConfig.__dataclass_fields__) - set(SETTINGS)
    parser.add_class_arguments(InferenceConfig, skip=others)
    return parser


def run(args: Sequence[str]) -> int:
    """Compute the missing features; return 1 if some images cannot be read."""
    own, arguments = split_backbone_arguments(args)
    options = parser()
    given = options.instantiate(options.parse_args(own))
    changed = options.parse_args(own, defaults=False)
    others = _check_images(given.images)
    settings = {name: given[name] for name in SETTINGS if name in changed}
    # Queries upsample bilinearly, and refine similarities themselves.
    settings |= {"upsampler": BILINEAR, "refine": None}
    student = load_student(given.weights, given.config, settings, arguments)
    student.backbone.to(usable_device(given.device))
    whole = student.config.block_size is not None and "max_side" not in changed  # a limit would leave nothing to divide
    segmenter = student.segmenter({}, None if whole else given.max_side)
    index = WritableIndex(
        Path(given.out), segmenter, given.dtype, Origin(given.weights, given.config, arguments, given.images)
    )
    images = scan_all(given.images, index.root, whole_names=True)
    entries = index.divided(images)
    todo = index.missing(entries)
    names = set(map(image_of, map(bytes.decode, todo.keys.tolist())))
    needed, free = float(index.sizes(todo).sum()), shutil.disk_usage(index.root).free
    total = sum(image_of(key.decode()) in names for key in entries.keys.tolist())
    parts = f" ({len(todo):,} of their {total:,} parts)" if total > len(names) else ""
    print(
        f"{len(names):,} images to do{parts}, {len(images) - len(names):,} done. Features: about {bytes_text(needed)}",
        flush=True,
    )
    if needed > free:
        raise CacheError(
            f"The features need {bytes_text(needed)}, but {index.root} has {bytes_text(free)} free. Use a smaller "
            "--max_side, --dtype int8, or another --out."
        )
    try:
        with block_bar(segmenter, index.blocks(todo), "blocks"):
            index.add(entries)
    except Stopped:
        print("Stopped. To continue, run the same command again.", flush=True)
        raise
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"An image is too large for the memory of {segmenter.device}. Finished images are kept. Use --block_size "
            "or a smaller --max_side, and another --out."
        ) from error
    print(f"{len(complete(list(map(bytes.decode, index.index.sources()[0].tolist())))):,} images in {index.root}")
    if others:
        print(f"{len(others)} other files without the suffix of an image were skipped, such as {others[0]}")
    rejected = index.unusable(images)
    if rejected:
        print(f"{len(rejected)} images cannot be read:")
        print("\n".join(f"  {name}: {reason}" for name, reason in rejected.items()))
    return 1 if rejected else 0


def _check_images(given: Sequence[str]) -> list[str]:
    """Check the images, and return the other files in a folder."""
    for name in given:
        path = Path(name)
        if not path.exists():
            raise UserError(f"No folder or tar file named {name!r}. Pass a folder of images, or tar files.")
        if path.is_file() and is_image(name):
            raise UserError(f"{name} is a single image. Pass its folder: {path.parent}.")
        if path.is_dir() and len(given) > 1:
            raise UserError(
                f"{name} is one of several folders, whose images could have the same names. Pass the folder that "
                "contains all of them, or build an index of each."
            )
    return [name for name in files_below(Path(given[0])) if not is_image(name)] if Path(given[0]).is_dir() else []
