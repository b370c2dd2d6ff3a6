"""`spar export`: conversion of a student to the format of another library, with a tested README."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from spar_lightning.cli.backbone_arguments import split_backbone_arguments
from spar_lightning.cli.help import CommandParser
from spar_lightning.errors import UserError
from spar_lightning.export import LIBRARIES, export
from spar_lightning.files.hub import PREFIX, HubError, check_new_name, upload
from spar_lightning.formatting import markdown
from spar_lightning.student import load_student

DESCRIPTION = """Export a student to the format of another library: weights, and a README with the license and the code
that loads the student and runs it on images of any size. A separate process then runs that code and compares the
features with those of the student at five image sizes. If they differ, nothing is exported.

Arguments of the backbone are passed as --model.backbone.NAME VALUE."""
EXAMPLES = (
    "spar export --weights runs/quickstart --to safetensors --out exports/quickstart",
    "spar export --weights tiny --to timm --out exports/tiny",
)


def run(args: Sequence[str]) -> int:
    """Export a student and print the largest differences from it."""
    parser = CommandParser("spar export", DESCRIPTION, EXAMPLES, "--weights WEIGHTS --to FORMAT --out DIR [options]")
    parser.add_argument(
        "--weights",
        required=True,
        help="Run folder, checkpoint, export, hf-hub:org/name, weight file with --config, or name of a backbone",
    )
    parser.add_argument("--to", required=True, choices=list(LIBRARIES), help="Target library or format")
    parser.add_argument("--out", required=True, type=Path, help="New folder for the export; must not exist")
    parser.add_argument("--config", help="YAML file of the run, if the weights do not name their network")
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="Upload the export to this repository of the Hugging Face Hub"
    )
    parser.add_argument("--private", action="store_true", help="With --push: create a private repository")
    own, arguments = split_backbone_arguments(args)
    given = parser.parse_args(own)
    if given.push:
        check_new_name(given.push)
    elif given.private:
        raise UserError("--private needs --push ORG/NAME.")
    student = load_student(given.weights, given.config, backbone=arguments)
    found = export(student, given.to, given.out)
    rows = [[each.output, f"{each.size[0]} x {each.size[1]}", f"{each.largest:.1e}"] for each in found]
    print(markdown([["output", "image", "largest difference"], *rows]))
    print(f"{given.out}: {', '.join(sorted(path.name for path in given.out.iterdir()))}")
    if given.push:
        try:
            address = upload(given.push, given.out, given.private)
        except HubError as error:
            command = shlex.join(
                ["hf", "upload", given.push, str(given.out), *(["--private"] if given.private else [])]
            )
            later = f"The export is in {given.out}; `{command}` uploads it."
            raise HubError(f"{error} {later}") from error
        print(f"{address}: load it as {PREFIX}{given.push}" if given.to == "safetensors" else address)
    return 0
