"""Evaluation protocol: all settings that an mIoU depends on, resolved and hashed.

The network is stored separately: results of two networks are comparable if their protocol hashes are equal.
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

ALGORITHM: Final = 2  # increase if the same network, images and settings give different label maps or counts


@dataclass(frozen=True)
class Protocol:
    """Settings that determine the segmentation maps, common to all benchmarks.

    Args:
        backbone: Evaluated network.
        config: Inference settings.
        precision: Precision of the network, as a Lightning precision string such as 32-true.
    """

    backbone: Backbone
    config: InferenceConfig
    precision: str

    def model(self) -> dict[str, Any]:
        """Return the network as plain data; weights are represented by their hash."""
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
            if config.blend != "mean":
                content["blend"] = config.blend
        else:
            if (attention := self.backbone.with_attention(config.windowed).attention_identity()) is not None:
                content["attention"] = attention
            if config.block_size is not None:
                content["block_size"] = config.block_size
        if config.refine is not None:
            content["refine"] = config.refine.identity()
        if (upsampler := config.build_upsampler()) is not None:
            content["upsampler"] = upsampler.identity()
        return content

    def of(self, benchmark: Benchmark) -> dict[str, Any]:
        """Return the settings of one benchmark: images, classes, sizes and thresholds."""
        own = benchmark.description.protocol(type(self.backbone))
        if self.config.refine is not None:
            own["thresholds"] = None  # thresholds apply to unrefined similarities only
        return {
            **own,
            "images": len(benchmark),
            "images_sha256": benchmark.digest(),
        }


def upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain data of a network or protocol with the current keys; versions up to 0.1 used other keys."""
    renamed = {"geometry": "patch_fit", "backbone": "family"}
    content = {renamed.get(key, key): value for key, value in content.items()}
    if "family" in content:  # formerly the class path
        content["family"] = str(content["family"]).rpartition(".")[2]
    return content


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return a text `key: value and other value` for each entry in which two protocols differ."""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [f"{key}: {_short(one.get(key))} and {_short(other.get(key))}" for key in keys]


def _short(value: Any) -> str:
    """Return the first 12 digits of a hash, and any other value as JSON."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)
