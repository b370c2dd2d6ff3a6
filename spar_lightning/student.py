"""From a run, a file or a name to a network that segments: `spar_lightning.load`.

Weights alone do not say which network they belong to. A run does in its config.yaml, an export of ours in the metadata
of its file; for any other weights a configuration has to. Each of them holds the `model` block of `spar fit`.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors import safe_open

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.checkpoints import STUDENT, load_weights
from spar_lightning.backbones.registry import find_backbone, plugins
from spar_lightning.backbones.weights import SUFFIXES, without_weights
from spar_lightning.configs import find
from spar_lightning.configs.renamed import check_renamed, upgraded, written_by_a_run
from spar_lightning.errors import UserError, user_error
from spar_lightning.segmentation.config import Inference, InferenceConfig, check_names
from spar_lightning.segmentation.prompts import TextClassifier, parse_classes
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import text_classifier

HEADER: Final = "spar_lightning"  # key of a safetensors file's metadata: the model block as JSON


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
    """Return a segmenter: image in, segmentation map out. It may be called from several threads.

    Args:
        source: Run folder of `spar fit`, its checkpoint, a file or folder of `spar export --to safetensors`, a weight
            file of the backbone's library together with `config`, or the name of a backbone such as siglip2.
        classes: Class names; `label: name, name` or `name, name` gives a class several. Without classes the segmenter
            gives features only.
        max_side: Most pixels of the long side that the network sees; larger images are shrunk, labels are not.
        device: Where the network runs; None takes a GPU if there is one.
        config: YAML file whose model block describes the network of the weights.
        backbone: Arguments of the backbone that differ from those of the run, such as {"text_weights": path}.
        inference: Settings of `InferenceConfig` that differ from those of the run, such as `inference="sliding"`,
            `stride=16` or `refine=LPOSS("spar")`; `refine=None` turns the refinement of the run off.

    Raises:
        UserError: A file, class or setting is missing or does not fit.
    """
    wanted, place = parse_classes(classes), usable_device(device)
    student = load_student(source, config, inference, backbone)
    student.backbone.to(place)
    return student.segmenter(wanted, max_side)


def usable_device(given: str | torch.device | None) -> torch.device:
    """Return the given device, or a GPU if there is one, else the CPU.

    Raises:
        UserError: This machine has no such device.
    """
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises several kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"device {given} cannot be used: {reason}. Give cpu, cuda, cuda:1 or mps.") from error
    return device


@dataclass(frozen=True)
class Student:
    """A trained network and where it comes from.

    Attributes:
        backbone: With the trained weights, frozen.
        config: Its settings of inference.
        block: The `model` block that describes it, as in a YAML file.
        run: The whole configuration of its run, as far as known.
        weights: The file that was read; None for a backbone without further training.
    """

    backbone: Backbone
    config: InferenceConfig
    block: dict[str, Any]
    run: dict[str, Any]
    weights: Path | None

    def base(self) -> Backbone:
        """Build the backbone as configured, with its pretrained weights, on the student's device."""
        backbone, _ = _instantiate(self.block)
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
            classes: Label to names; none for features only.
            max_side: Most pixels of the long side that the network sees.
            inference: None as configured.
            backbone: None takes the trained network.
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
    """Return the network that a source stands for, frozen, on the CPU.

    Args:
        source: As for `load`.
        config: YAML file whose model block replaces the source's own.
        inference: Settings of `InferenceConfig` that replace those there.
        backbone: Arguments of the backbone that replace those there.

    Raises:
        UserError: As for `load`.
    """
    path, given = Path(source), dict(inference or {})
    check_names(given, "load")
    # None is a setting where it is the default (no refinement); elsewhere it means as in the run.
    defaults = {field.name: field.default for field in fields(InferenceConfig)}
    changed = {key: value for key, value in given.items() if value is not None or defaults[key] is None}
    plugins()  # once imported, their classes have short names
    if config is not None:
        content = _read_configuration(Path(find(str(config))))
    elif path.exists():
        content = _recorded(path)
    else:
        cls = _class(str(source))
        content = {"model": {"backbone": f"{cls.__module__}.{cls.__qualname__}"}}
    names = ("backbone", *InferenceConfig.__dataclass_fields__)
    block = {key: value for key, value in content["model"].items() if key in names}
    chosen = block["backbone"]
    chosen = {"class_path": chosen} if isinstance(chosen, str) else chosen
    block["backbone"] = {**chosen, "init_args": {**(chosen.get("init_args") or {}), **(backbone or {})}}
    block = {key: value for key, value in block.items() if key not in changed}
    # Weights that are read next need not be loaded, or downloaded, from where the run took its own.
    with without_weights() if path.exists() else nullcontext():
        network, settings = _instantiate(block)
    settings = replace(settings, **changed)
    if path.exists():
        return Student(network, settings, block, content, load_weights(network, str(path)))
    if not isinstance(network, _class(str(source))):
        raise UserError(f"{source} is another backbone than that of {config}. Leave one of them out.")
    return Student(network, settings, block, content, None)


def _recorded(path: Path) -> dict[str, Any]:
    """Return the configuration next to the weights, or the model block in their metadata."""
    folder = path.absolute().parent
    run = folder.parent if folder.name == "checkpoints" else path
    if (run / "config.yaml").is_file():
        return _read_configuration(run / "config.yaml")
    file = path / STUDENT if path.is_dir() else path
    if file.suffix == ".safetensors" and file.is_file():
        try:
            with safe_open(file, "pt") as tensors:
                recorded = (tensors.metadata() or {}).get(HEADER)
        except Exception as error:  # safetensors raises its own, which derives from nothing more
            raise UserError(f"{file} cannot be read as safetensors ({error}). Fetch or export it again.") from error
        if recorded:
            return upgraded({"model": json.loads(recorded)})
    raise UserError(
        f"{path} does not say which network its weights belong to. Give a run folder of spar fit, a file of `spar "
        "export --to safetensors`, or the YAML file of the training: config=.. in Python, --config in the shell."
    )


def _read_configuration(path: Path) -> dict[str, Any]:
    """Read a YAML file of `spar fit` that names a backbone; one that a run wrote may be of an older version."""
    if not path.is_file():
        raise UserError(f"There is no configuration {path}. Give the YAML file of the run.")
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}).") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model.get("backbone"):
        raise UserError(f"{path} has no model.backbone. Give a configuration of spar fit.")
    if written_by_a_run(path):
        return upgraded(content)
    check_renamed(content, str(path))
    return dict(content)


def _class(name: str) -> type[Backbone]:
    """Return the backbone class of a name."""
    if "/" in name or name.endswith(SUFFIXES):
        raise UserError(f"There is no file or folder {name}. Give a run folder such as runs/NAME, or a weight file.")
    try:
        return find_backbone(name)
    except UserError as error:
        raise UserError(
            f"{name} is neither a file nor a folder nor a backbone. {error} A run is a folder such as runs/NAME."
        ) from error


def _instantiate(block: dict[str, Any]) -> tuple[Backbone, InferenceConfig]:
    """Build the backbone, frozen, and the settings of a model block."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    parser.add_class_arguments(InferenceConfig, "config")
    config = {key: value for key, value in block.items() if key != "backbone"}
    try:
        made = parser.instantiate_classes(parser.parse_object({"backbone": block["backbone"], "config": config}))
    except Exception as error:  # jsonargparse raises several kinds
        cause = user_error(error) or f"The model block cannot be used: {' '.join(str(error).split())}"
        raise UserError(str(cause)) from error
    backbone, settings = made.backbone, made.config
    assert isinstance(backbone, Backbone)
    assert isinstance(settings, InferenceConfig)
    return backbone.requires_grad_(False), settings
