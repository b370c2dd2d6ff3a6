"""All that an mIoU depends on, resolved and hashed.

The network and the protocol are told apart: two networks are comparable if their protocols have one hash.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from spar_lightning.backbones.base import Backbone
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.files.hashing import hash_json
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.prompts import prompt_templates

ALGORITHM: Final = 1  # raised by hand when the same network, images and settings give other label maps or counts


@dataclass(frozen=True)
class Protocol:
    """How images become segmentation maps, the same for all benchmarks.

    Args:
        backbone: The network that is measured.
        config: How it segments.
        precision: Precision of the network, in Lightning's terms.
    """

    backbone: Backbone
    config: InferenceConfig
    precision: str

    def model(self) -> dict[str, Any]:
        """Return the network as plain data; weights by their hash."""
        return {**self.backbone.identity(), "window": self.backbone.window, "text": self.backbone.text_identity()}

    def content(self) -> dict[str, Any]:
        """Return the protocol as plain data."""
        config, templates = self.config, prompt_templates(self.config.templates)
        content: dict[str, Any] = {
            "algorithm": ALGORITHM,
            "inference": config.inference,
            "patch_fit": config.patch_fit,
            "precision": self.precision,
            "templates": len(templates),
            "templates_sha256": hash_json(templates, 12),
        }
        if config.inference == "sliding":
            content["stride"] = config.stride
        if config.refine is not None:
            content["refine"] = config.refine.identity()
        if (upsampler := config.build_upsampler()) is not None:
            content["upsampler"] = upsampler.identity()
        return content

    def of(self, benchmark: Benchmark) -> dict[str, Any]:
        """Return what one benchmark adds: its images, classes, sizes and thresholds."""
        own = benchmark.description.protocol(type(self.backbone))
        if self.config.refine is not None:
            own["thresholds"] = None  # they are those of cosines
        return {
            **own,
            "images": len(benchmark),
            "images_sha256": benchmark.digest(),
        }


def upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's or protocol's plain data in today's keys; versions up to 0.1 wrote others."""
    renamed = {"geometry": "patch_fit", "backbone": "family"}
    content = {renamed.get(key, key): value for key, value in content.items()}
    if "family" in content:  # once the class path
        content["family"] = str(content["family"]).rpartition(".")[2]
    return content


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """`key: this and that` for every entry in which two protocols differ."""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [f"{key}: {_short(one.get(key))} and {_short(other.get(key))}" for key in keys]


def _short(value: Any) -> str:
    """A hash by its first digits, everything else as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)
