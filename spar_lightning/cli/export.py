"""`spar export`: a student in the format of another library, with a README that has been run."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from spar_lightning.cli.backbone_arguments import split_backbone_arguments
from spar_lightning.export import LIBRARIES, export
from spar_lightning.formatting import markdown
from spar_lightning.student import load_student

DESCRIPTION = """Write the student of a run for another library: its weights, and a README with the licence, three lines
that load it, and how to give it images of any size. That library then loads the folder in a process of its own and is
compared with the student at five sizes; an export that differs is not written."""

EPILOG = """examples:
  spar export --weights runs/siglip2_vitb16 --to open_clip --out exports/open_clip
  spar export --weights runs/siglip2_vitb16 --to onnx --out exports/onnx          # pip install 'spar-lightning[onnx]'
  spar export --weights student.ckpt --config siglip2_vitb16 --to timm --out exports/timm"""


def run(args: Sequence[str]) -> int:
    """Run the command."""
    parser = ArgumentParser(
        "spar export", description=DESCRIPTION, epilog=EPILOG, formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--weights",
        required=True,
        help="run folder, checkpoint, export, weight file with --config, or a backbone's name",
    )
    parser.add_argument("--to", required=True, choices=list(LIBRARIES), help="library")
    parser.add_argument("--out", required=True, type=Path, help="folder, which does not exist yet")
    parser.add_argument("--config", help="YAML file of the run, where the weights do not say what they are of")
    own, arguments = split_backbone_arguments(args)
    given = parser.parse_args(own)
    student = load_student(given.weights, given.config, backbone=arguments)
    found = export(student, given.to, given.out)
    rows = [[each.output, f"{each.size[0]} x {each.size[1]}", f"{each.largest:.1e}"] for each in found]
    print(markdown([["output", "image", "largest difference"], *rows]))
    print(f"{given.out}: {', '.join(sorted(path.name for path in given.out.iterdir()))}")
    return 0
