"""InferenceConfig: every setting that decides how a network's image becomes a segmentation map.

The keys of `model:` in a configuration, the options of `spar evaluate` and `spar predict`, the keyword arguments of
`spar_lightning.load` and the protocol of an evaluation all come from its fields.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from spar_lightning.errors import UserError, check_at_least, nearest
from spar_lightning.image.resize import PatchFit
from spar_lightning.refinement.anyup import BILINEAR, AnyUp, check_weights
from spar_lightning.refinement.base import Refinement
from spar_lightning.segmentation.prompts import Templates, prompt_templates

Inference = Literal["single", "sliding"]


@dataclass(frozen=True)
class InferenceConfig:
    """Settings of inference.

    Args:
        inference: `single` sees the whole image in one pass; `sliding` averages the similarities of overlapping
            windows, pixel by pixel, as the teacher does.
        stride: Step between windows in pixels, of the teacher and of sliding-window inference; the paper takes 24 with
            patches of 16.
        window_batch: Windows per forward pass; null chooses by the device.
        templates: Prompts of class names, averaged: openai_imagenet, the 80 of CLIP and of the paper, or a list with
            `{}` for the name.
        patch_fit: Images whose sides are not multiples of the patch size: `aligned` resizes them to the nearest
            multiples, `paper` does what the published code does for the family of the backbone.
        refine: What follows the similarities, by class name: LPOSS spreads them over similar patches; null leaves them.
        upsampler: From the patch grid to pixels: `bilinear`; guided by the image, `anyup` with the weights of its
            paper or `anyup_multi_backbone` with those for many backbones; or the path of a weight file of AnyUp.

    Raises:
        UserError: A setting is outside its range.
    """

    inference: Inference = "single"
    stride: int = 24
    window_batch: int | None = None
    templates: Templates = "openai_imagenet"
    patch_fit: PatchFit = "aligned"
    refine: Refinement | None = None
    upsampler: str = BILINEAR

    def __post_init__(self) -> None:
        for name, allowed in (("inference", get_args(Inference)), ("patch_fit", get_args(PatchFit))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} must be {' or '.join(allowed)}, but got {getattr(self, name)!r}.")
        check_at_least(1, stride=self.stride, window_batch=self.window_batch)
        if self.refine is not None and not isinstance(self.refine, Refinement):
            raise UserError(f"refine must be a Refinement such as LPOSS(preset='spar'), but got {self.refine!r}.")
        prompt_templates(self.templates)
        if self.upsampler != BILINEAR:
            check_weights(self.upsampler)

    def build_upsampler(self) -> AnyUp | None:
        """Return the guided upsampler on the CPU; None stands for bilinear.

        Raises:
            WeightsError: Its weights cannot be read or downloaded.
        """
        return None if self.upsampler == BILINEAR else AnyUp(self.upsampler)


def check_names(given: dict[str, Any], where: str) -> None:
    """Raise UserError unless all keys are fields of `InferenceConfig`."""
    names = [field.name for field in fields(InferenceConfig)]
    for name in given:
        if name not in names:
            raise UserError(f"{where}: unknown setting {name!r}. {nearest(name, names)}Allowed are {', '.join(names)}.")
