"""`spar doctor`: check the installation and, with --config, run two training steps of a configuration.

Lightning is imported only for the steps: its import fails if torch and torchvision do not match, which is one of the
checks.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from spar_lightning.cli.doctor_checks import Finding, system
from spar_lightning.cli.help import CommandParser
from spar_lightning.errors import UserError


def run(args: Sequence[str]) -> int:
    """Print the findings; return 1 if anything needs to be fixed."""
    parser = CommandParser(
        "spar doctor",
        "Check the installation: package versions, devices, plugins, disk and shared memory. With --config, also "
        "check the folders of a configuration and run two training steps in a temporary folder.\n\n"
        "Each line is `ok`, or `FIX` with what to do; then the exit code is 1. Further options after --config are "
        "those of spar fit.",
        ("spar doctor", "spar doctor --config quickstart"),
    )
    parser.add_argument("--config", help="YAML file or name of a bundled configuration; other options as for spar fit")
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON")
    given, rest = parser.parse_known_args(args)
    if rest and given.config is None:
        raise UserError(f"{rest[0]} is allowed only together with --config. Pass --config CONFIG.")
    findings = list(system())
    if given.config is not None and any(finding.name == "torchvision" and finding.fix for finding in findings):
        findings.append(
            Finding("configuration", "not checked: torchvision cannot be imported", "fix torchvision first")
        )
    elif given.config is not None:
        from spar_lightning.cli.doctor_config import configuration

        findings += configuration(["--config", given.config, *rest])
    wrong = [finding for finding in findings if finding.fix]
    if given.json:
        print(json.dumps([{"ok": finding.fix is None, **asdict(finding)} for finding in findings], indent=2))
        return 1 if wrong else 0
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'FIX' if finding.fix else 'ok':<5} {finding.name:<{width}}  {finding.text}")
        if finding.fix:
            print(f"{'':<5} {'':<{width}}  -> {finding.fix}")
    if wrong:
        print(f"{len(wrong)} of {len(findings)} checks need a fix", file=sys.stderr)
    return 1 if wrong else 0
