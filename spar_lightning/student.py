"""`spar_lightning.load`: load a segmenter from a run, a weight file or the name of a backbone.

Weights alone do not record which network they belong to. A run records it in config.yaml, and an export of `spar
export` in the metadata of its file; other weights need a configuration file. All of these contain the `model` block of
`spar fit`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.checkpoints import STUDENT, load_weights, local, warn_if_random
from spar_lightning.backbones.registry import class_path, find_backbone, plugins
from spar_lightning.backbones.weights import SUFFIXES, without_weights
from spar_lightning.configs import find
from spar_lightning.configs.renamed import check_renamed, upgraded, written_by_a_run
from spar_lightning.errors import UserError, user_error
from spar_lightning.header import read_header
from spar_lightning.segmentation.config import Inference, InferenceConfig, check_names
from spar_lightning.segmentation.prompts import TextClassifier, parse_classes
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import text_classifier


def load(
    source: str | Path,
    classes: str | Sequence[str] | Mapping[str, Sequence[str]] = (),
    *,
    max_side: int | None = None,
    device: str | torch.device | None = None,
    config: str | Path | None = None,
    backbone: Mapping[str, Any] | None = None,
    **inference: Any,
) -> Segmenter:
    """Load a segmenter, which maps images to segmentation maps. It can be called from several threads.

    Args:
        source: Run folder of `spar fit`, a checkpoint in it, a file or folder of `spar export --to safetensors`, such
            an export on the Hugging Face Hub (hf-hub:org/name, or hf-hub:org/name@revision), a weight file of the
            backbone's library together with `config`, or the name of a backbone such as siglip2.
        classes: Class names; `label: name, name` or `name, name` sets several names for a class. Without classes, the
            segmenter only returns features.
        max_side: Maximum long side in pixels that the network sees. Larger images are downscaled, but the segmentation
            map keeps the size of the image.
        device: Device of the network; None uses a GPU if available.
        config: YAML file with a `model` block that describes the network of the weights.
        backbone: Arguments of the backbone that override those of the run, such as {"text_weights": path}.
        inference: Settings of `InferenceConfig` that override those of the run, such as `inference="sliding"`,
            `stride=16` or `refine=LPOSS("spar")`; `refine=None` disables the refinement of the run.

    Raises:
        UserError: If a file is missing or does not match the network, or a class or setting is invalid.
    """
    wanted, place = parse_classes(classes), usable_device(device)
    student = load_student(source, config, inference, backbone)
    student.backbone.to(place)
    return student.segmenter(wanted, max_side)


def usable_device(given: str | torch.device | None) -> torch.device:
    """Return the given device; None selects a GPU if available and the CPU otherwise.

    Raises:
        UserError: If the device is not available.
    """
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises several types
        reason = str(error).splitlines()[0]
        raise UserError(f"device {given} cannot be used: {reason}. Use cpu, cuda, cuda:1 or mps.") from error
    return device


@dataclass(frozen=True)
class Student:
    """Trained network and its origin.

    Attributes:
        backbone: Backbone with the trained weights, frozen.
        config: Inference settings.
        block: `model` block that describes the network, as in a YAML file.
        run: Complete configuration of the run, as far as known.
        weights: Weight file that was read; None for a backbone without further training.
    """

    backbone: Backbone
    config: InferenceConfig
    block: dict[str, Any]
    run: dict[str, Any]
    weights: Path | None

    def base(self) -> Backbone:
        """Build the backbone with its pretrained weights, as before training, on the student's device."""
        backbone, _ = _instantiate(self.block, str(self.weights))
        warn_if_random(backbone)
        return backbone.to(next(self.backbone.parameters()).device)

    def segmenter(
        self,
        classes: Mapping[str, Sequence[str]],
        max_side: int | None = None,
        inference: Inference | None = None,
        backbone: Backbone | None = None,
    ) -> Segmenter:
        """Return a segmenter on the backbone's device.

        Args:
            classes: Class names for each label; an empty mapping returns a segmenter for features only.
            max_side: Maximum long side in pixels that the network sees; None sets no limit.
            inference: `single` or `sliding`; None uses the configured mode.
            backbone: Backbone to use; None uses the trained one.
        """
        network = backbone or self.backbone
        if classes:
            classifier = text_classifier(network, classes, self.config.templates)
            network.drop_text_tower()
        else:
            classifier = TextClassifier((), torch.empty(0, network.embed_dim), torch.empty(0, dtype=torch.long))
        config = self.config if inference is None else replace(self.config, inference=inference)
        return Segmenter(network, classifier, config, max_side=max_side)


def load_student(
    source: str | Path,
    config: str | Path | None = None,
    inference: Mapping[str, Any] | None = None,
    backbone: Mapping[str, Any] | None = None,
) -> Student:
    """Load the network of a source, frozen, on the CPU.

    Args:
        source: Run folder, weight file, repository or backbone name, as for `load`.
        config: YAML file with a `model` block that replaces the one of the source.
        inference: Settings of `InferenceConfig` that override those of the `model` block.
        backbone: Arguments of the backbone that override those of the `model` block.

    Raises:
        UserError: As for `load`.
    """
    path, given = local(str(source)), dict(inference or {})
    exists = os.path.exists(path)  # False for a name that is too long for a path
    check_names(given, "load")
    # If None is the default of a setting (no refinement), it is a value; otherwise it means "as in the run".
    defaults = {field.name: field.default for field in fields(InferenceConfig)}
    changed = {key: value for key, value in given.items() if value is not None or defaults[key] is None}
    plugins()  # importing them registers the short names of their classes
    if config is not None:
        content = _read_configuration(Path(find(str(config))))
    elif exists:
        content = _recorded(path)
    else:
        content = {"model": {"backbone": class_path(_class(str(source)))}}
    names = ("backbone", *InferenceConfig.__dataclass_fields__)
    block = {key: value for key, value in content["model"].items() if key in names}
    block["backbone"] = _with_arguments(block["backbone"], backbone or {}, str(config or source))
    block = {key: value for key, value in block.items() if key not in changed}
    # Pretrained weights that are replaced in the next step are neither read nor downloaded.
    with without_weights() if exists else nullcontext():
        network, settings = _instantiate(block, str(config or source))
    settings = replace(settings, **changed)
    settings.check_blocks()
    network = network.with_attention(settings.windowed)
    if exists:
        return Student(network, settings, block, content, load_weights(network, str(path)))
    if not isinstance(network, _class(str(source))):
        raise UserError(f"{source} is not the backbone of {config}. Pass only one of them.")
    if config is None and None not in (backbone or {}).values() and (how := network.random_weights()):
        raise UserError(
            f"{source} has no weights. {how} Pass it as --model.backbone.NAME VALUE, or backbone={{NAME: VALUE}} in "
            "Python; null selects random weights."
        )
    warn_if_random(network)
    return Student(network, settings, block, content, None)


def _recorded(path: Path) -> dict[str, Any]:
    """Return the configuration next to the weights, or the model block in their metadata."""
    folder = path.absolute().parent
    run = folder.parent if folder.name == "checkpoints" else path
    if (run / "config.yaml").is_file():
        return _read_configuration(run / "config.yaml")
    file = path / STUDENT if path.is_dir() else path
    if file.suffix == ".safetensors" and file.is_file() and (block := read_header(file)):
        return {"model": block}
    raise UserError(
        f"{path} does not record which network its weights belong to. Use a run folder of spar fit or a file of `spar "
        "export --to safetensors`, or pass the YAML file of the training: config=.. in Python, --config in the shell."
    )


def _read_configuration(path: Path) -> dict[str, Any]:
    """Read a YAML file of `spar fit` with a backbone; a file that a run wrote may be of an older version."""
    if not path.is_file():
        raise UserError(f"The configuration {path} does not exist. Pass the YAML file of the run.")
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}).") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model.get("backbone"):
        raise UserError(f"{path} has no model.backbone. Pass a configuration of spar fit.")
    if written_by_a_run(path):
        return upgraded(content)
    check_renamed(content, str(path))
    return dict(content)


def _with_arguments(chosen: Any, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the class of a backbone and its arguments, with those of the caller.

    Raises:
        UserError: The configuration names no class, or its arguments are not a mapping.
    """
    given = {"class_path": chosen} if isinstance(chosen, str) else chosen
    own = (given.get("init_args") or {}) if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(own, Mapping) or not isinstance(given.get("class_path"), str):
        raise UserError(
            f"{where}: model.backbone must be a class, or class_path and init_args, but got {chosen!r}. Pass the YAML "
            "file of the training."
        )
    return {**given, "init_args": {**own, **arguments}}


def _class(name: str) -> type[Backbone]:
    """Return the backbone class with this name."""
    if "/" in name or name.endswith(SUFFIXES):
        raise UserError(f"No file or folder named {name!r}. Pass a run folder such as runs/NAME, or a weight file.")
    try:
        return find_backbone(name)
    except UserError as error:
        raise UserError(
            f"{name!r} is not a file, a folder or a backbone. {error} A run is a folder such as runs/NAME."
        ) from error


def _instantiate(block: dict[str, Any], source: str) -> tuple[Backbone, InferenceConfig]:
    """Build the frozen backbone and the inference settings of a model block; `source` names it in errors."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    parser.add_class_arguments(InferenceConfig, "config")
    config = {key: value for key, value in block.items() if key != "backbone"}
    try:
        made = parser.instantiate_classes(parser.parse_object({"backbone": block["backbone"], "config": config}))
    except Exception as error:  # jsonargparse raises several types
        if cause := user_error(error):
            raise UserError(str(cause)) from error
        text = " ".join(str(error).split())
        listed = re.search(r"- Problem with given class_path (.*?)(?: - Expected| Given value type|$)", text)
        reason = (listed[1] if listed else text).rstrip(".")
        raise UserError(f"{source}: the model block is invalid: {reason}. Fix it, or pass another --config.") from error
    backbone, settings = made.backbone, made.config
    assert isinstance(backbone, Backbone)
    assert isinstance(settings, InferenceConfig)
    return backbone.requires_grad_(False), settings
