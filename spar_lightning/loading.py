"""From what people have, a run, a file, a name, to a network that segments: `spar_lightning.load`.

Weights alone do not say what network they are of. A run does in its config.yaml, an export of ours in the
header of its file; for any other weights a configuration has to. What they say is the `model` block of
`spar fit`, read by the class that it was written for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors import safe_open

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.plugins import find_backbone, plugins
from spar_lightning.backbones.weights import SUFFIXES
from spar_lightning.configs import named
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError, check_at_least, user_error
from spar_lightning.refine import LPOSS, Refinement
from spar_lightning.segmenter import Inference, Segmenter
from spar_lightning.student_weights import STUDENT
from spar_lightning.student_weights import load as load_weights
from spar_lightning.text_embeddings import text_classifier
from spar_lightning.zero_shot import Templates, TextClassifier, parse_classes

HEADER: Final = "spar_lightning"  # of such a file: the model block as JSON
# Of the model block, what a network and its segmentation depend on.
SETTINGS: Final = ("backbone", "stride", "window_batch", "templates", "geometry", "inference", "refine", "upsampler")


def load(
    source: str | Path,
    classes: str | Sequence[str] | Mapping[str, Sequence[str]] = (),
    *,
    inference: Inference | None = None,
    stride: int | None = None,
    templates: Templates | None = None,
    refine: Refinement | LPOSS | None = None,
    upsampler: str | None = None,
    max_side: int | None = None,
    device: str | torch.device | None = None,
    config: str | Path | None = None,
    backbone: Mapping[str, Any] | None = None,
) -> Segmenter:
    """Make a segmenter: image in, label map out. Once made, it may be called from several threads.

    Settings that are None are those of the run.

    Args:
        source: Run folder of `spar fit`, its checkpoint, a file or folder of `spar export --to safetensors`, a weight
            file of the backbone's library together with `config`, or the name of a backbone such as siglip2.
        classes: Class names; `label: name, name` or `name, name` gives a class several. None at all leave features.
        inference: `single` pass, or `sliding` window, the teacher's way.
        stride: Step between windows in pixels.
        templates: Prompts with `{}` for the name, averaged; openai_imagenet are the paper's 80.
        refine: `none`, `lposs`, `lposs_spar`, or an LPOSS.
        upsampler: `bilinear`, `anyup`, `anyup_multi_backbone`, or a weight file of AnyUp.
        max_side: Most pixels of the long side that the network sees; larger images are shrunk, labels are not.
        device: Where the network runs; None takes a GPU if there is one.
        config: YAML file whose model block says what the weights are of.
        backbone: Arguments of the backbone that differ from what the run says, such as {"text_weights": path}.

    Raises:
        UserError: Something of that is missing or does not fit.
    """
    given = {"inference": inference, "stride": stride, "templates": templates, "refine": refine, "upsampler": upsampler}
    wanted, place = parse_classes(classes), usable_device(device)
    student = load_student(source, config, {k: v for k, v in given.items() if v is not None}, backbone)
    student.module.to(place).requires_grad_(False)
    return student.segmenter(wanted, max_side)


def usable_device(given: str | torch.device | None) -> torch.device:
    """The device that is given, or a GPU if there is one.

    Raises:
        UserError: There is no such device here.
    """
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own, of several kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"device {given} cannot be used: {reason}. Give cpu, cuda, cuda:1 or mps.") from error
    return device


@dataclass(frozen=True)
class Student:
    """A trained network and where it comes from.

    Attributes:
        module: Its `student` has the trained weights; what trained is not known to it, `base` is the teacher's network.
        block: The settings that made it, as in a YAML file.
        config: All that its run was told, where that is known.
        weights: The file that was read; None for a backbone as it comes.
    """

    module: Distillation
    block: dict[str, Any]
    config: dict[str, Any]
    weights: Path | None

    def base(self) -> Backbone:
        """The backbone as configured, before any training, on the module's device: made anew."""
        return _instantiate(self.block).student.requires_grad_(False).to(self.module.device)

    def segmenter(
        self,
        classes: Mapping[str, Sequence[str]],
        max_side: int | None = None,
        inference: Inference | None = None,
        backbone: Backbone | None = None,
    ) -> Segmenter:
        """A segmenter on the module's device, with the settings of the module.

        Args:
            classes: Label to names; none leave features.
            max_side: Most pixels of the long side that the network sees.
            inference: None as the module's.
            backbone: None takes the trained network.
        """
        module, network = self.module, backbone or self.module.student
        upsampler = module.build_upsampler()
        if upsampler is not None:
            upsampler.to(module.device)
        check_at_least(1, max_side=max_side)
        if classes:
            classifier = text_classifier(network, classes, module.templates)
            network.drop_text_tower()
        else:
            classifier = TextClassifier((), torch.empty(0, network.embed_dim), torch.empty(0, dtype=torch.long))
        return Segmenter(
            network,
            classifier.to(module.device),
            inference or module.inference,
            module.stride,
            module.window_batch,
            geometry=module.geometry,
            max_side=max_side,
            refine=module.refinement(),
            upsampler=upsampler,
        )


def load_student(
    source: str | Path,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    backbone: Mapping[str, Any] | None = None,
) -> Student:
    """The network that a source stands for.

    Args:
        source: As `load` takes it.
        config: YAML file whose model block counts instead of the source's own.
        settings: Of the model block, instead of those there.
        backbone: Arguments of the backbone, instead of those there.

    Raises:
        UserError: As `load`.
    """
    path = Path(source)
    plugins()  # imported, their classes have short names
    if config is not None:
        content = _configuration(Path(named(str(config))))
    elif path.exists():
        content = _recorded(path)
    else:
        cls = _class(str(source))
        content = {"model": {"backbone": f"{cls.__module__}.{cls.__qualname__}"}}
    block = {key: value for key, value in content["model"].items() if key in SETTINGS} | dict(settings or {})
    chosen = block["backbone"]
    chosen = {"class_path": chosen} if isinstance(chosen, str) else chosen
    block["backbone"] = {**chosen, "init_args": {**(chosen.get("init_args") or {}), **(backbone or {})}}
    module = _instantiate(block)
    if not path.exists():
        if not isinstance(module.student, _class(str(source))):
            raise UserError(f"{source} is another backbone than that of {config}. Leave one of them out.")
        return Student(module, block, content, None)
    return Student(module, block, content, load_weights(module.student, str(path)))


def _recorded(path: Path) -> dict[str, Any]:
    """The configuration that lies beside the weights, or its model block in them."""
    folder = path.absolute().parent
    run = folder.parent if folder.name == "checkpoints" else path
    if (run / "config.yaml").is_file():
        return _configuration(run / "config.yaml")
    file = path / STUDENT if path.is_dir() else path
    if file.suffix == ".safetensors" and file.is_file():
        try:
            with safe_open(file, "pt") as tensors:
                recorded = (tensors.metadata() or {}).get(HEADER)
        except Exception as error:  # safetensors' own, which derives from nothing more
            raise UserError(f"{file} cannot be read as safetensors ({error}). Fetch or export it again.") from error
        if recorded:
            return {"model": json.loads(recorded)}
    raise UserError(
        f"{path} does not say which network its weights are of. Give a run folder of spar fit, a file of `spar export "
        "--to safetensors`, or the YAML file that it was trained with: config=.. in Python, --config in the shell."
    )


def _configuration(path: Path) -> dict[str, Any]:
    """A YAML file of fit, with a backbone in it."""
    if not path.is_file():
        raise UserError(f"There is no configuration {path}. Give the YAML file of the run.")
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}).") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model.get("backbone"):
        raise UserError(f"{path} has no model.backbone. Give a configuration of spar fit.")
    return dict(content)


def _class(name: str) -> type[Backbone]:
    """The backbone that is meant by its name."""
    if "/" in name or name.endswith(SUFFIXES):
        raise UserError(f"There is no file or folder {name}. Give a run folder such as runs/NAME, or a weight file.")
    try:
        return find_backbone(name)
    except UserError as error:
        raise UserError(
            f"{name} is neither a file nor a folder nor a backbone. {error} A run is a folder such as runs/NAME."
        ) from error


def _instantiate(block: dict[str, Any]) -> Distillation:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Distillation, "model")
    try:
        module = parser.instantiate_classes(parser.parse_object({"model": block})).model
    except Exception as error:  # jsonargparse's own, of several types
        cause = user_error(error) or f"The model block cannot be used: {' '.join(str(error).split())}"
        raise UserError(str(cause)) from error
    assert isinstance(module, Distillation)
    return module
