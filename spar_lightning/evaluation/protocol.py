"""All that an mIoU depends on, resolved and hashed.

The network and the protocol are told apart: two networks are comparable if their protocols have one hash.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from spar_lightning.backbones.base import Backbone
from spar_lightning.datamodules.benchmark import Benchmark
from spar_lightning.datamodules.manifest import fingerprint
from spar_lightning.geometry import Geometry
from spar_lightning.refine import LPOSS, AnyUp
from spar_lightning.segmenter import Inference
from spar_lightning.zero_shot import Templates, prompt_templates

ALGORITHM: Final = 1  # raised by hand when the same network, images and settings give other label maps or counts


def digest(content: Any) -> str:
    """Twelve hexadecimal digits that stand for plain data."""
    return fingerprint(content)[:12]


@dataclass(frozen=True)
class Protocol:
    """How images become label maps, the same for all benchmarks.

    Attributes:
        backbone: The network that is measured.
        inference: single or sliding.
        stride: Step between windows in pixels; of sliding.
        geometry: What becomes of sides that the patch does not divide.
        templates: Prompts of class names.
        precision: Of the network's arithmetic, in Lightning's terms.
        refine: What follows the cosines; null: nothing.
        upsampler: From the patch grid to pixels; null: bilinear.
    """

    backbone: Backbone
    inference: Inference
    stride: int
    geometry: Geometry
    templates: Templates
    precision: str
    refine: LPOSS | None = None
    upsampler: AnyUp | None = None

    def model(self) -> dict[str, Any]:
        """The network as plain data; weights by their digest."""
        return {**self.backbone.identity(), "window": self.backbone.window, "text": self.backbone.text_identity()}

    def content(self) -> dict[str, Any]:
        """The protocol as plain data."""
        templates = prompt_templates(self.templates)
        content: dict[str, Any] = {
            "algorithm": ALGORITHM,
            "inference": self.inference,
            "geometry": self.geometry,
            "precision": self.precision,
            "templates": len(templates),
            "templates_sha256": digest(templates),
        }
        if self.inference == "sliding":
            content["stride"] = self.stride
        if self.refine is not None:
            content["refine"] = {"name": "LPOSS", **asdict(self.refine)}
        if self.upsampler is not None:
            content["upsampler"] = self.upsampler.identity()
        return content

    def of(self, benchmark: Benchmark) -> dict[str, Any]:
        """What one benchmark adds: its images, classes, sizes and thresholds."""
        own = benchmark.description.protocol(type(self.backbone))
        if self.refine is not None:
            own["thresholds"] = None  # they are those of cosines
        return {
            **own,
            "images": len(benchmark),
            "images_sha256": benchmark.digest(),
        }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """`key: this and that` for every entry in which two protocols differ."""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [f"{key}: {_short(one.get(key))} and {_short(other.get(key))}" for key in keys]


def _short(value: Any) -> str:
    """A hash by its first digits, everything else as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)
