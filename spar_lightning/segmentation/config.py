"""Inference settings: how a network turns an image into a segmentation map.

The fields of `InferenceConfig` define the keys of `model:` in a configuration, the options of `spar evaluate` and
`spar predict`, the keyword arguments of `spar_lightning.load`, and the protocol of an evaluation.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.errors import UserError, check_at_least, nearest
from spar_lightning.image.resize import PatchFit
from spar_lightning.refinement.anyup import BILINEAR, AnyUp, check_weights
from spar_lightning.refinement.base import Refinement
from spar_lightning.segmentation.prompts import Templates, prompt_templates
from spar_lightning.sliding_window import Blend

Inference = Literal["single", "sliding"]
CHOICES = {"inference": get_args(Inference), "blend": get_args(Blend), "patch_fit": get_args(PatchFit)}


@dataclass(frozen=True)
class InferenceConfig:
    """Inference settings of a segmentation network.

    Args:
        inference: `single` processes the whole image in one forward pass. `sliding` averages the similarities of
            overlapping windows per pixel.
        stride: Step between windows in pixels, for the teacher and for sliding-window inference. The paper uses 24
            with a patch size of 16.
        window_batch: Number of windows per forward pass; null chooses it by the device.
        templates: Prompt templates of class names; the embeddings of all prompts are averaged. Either openai_imagenet
            (the 80 templates of CLIP, as in the paper) or a list of prompts that contain `{}` in place of the name.
        patch_fit: How image sides are made multiples of the patch size: `aligned` resizes to the nearest multiples,
            `paper` does what the published code does for the family of the backbone.
        refine: Refinement of the similarities, given by class name. LPOSS spreads them over similar patches; null
            disables refinement.
        upsampler: Upsampling from the patch grid to pixels: `bilinear`; `anyup` (guided by the image, weights of the
            AnyUp paper); `anyup_multi_backbone` (the same, weights for many backbones); or the path of an AnyUp
            weight file.
        attention: Attention of the single pass: `full` (the paper), `windowed` (each patch attends to as many patches
            as in pretraining), or settings such as {reach: 1.25, tile: 4}.
        blend: Weights of overlapping windows: `mean` (the paper), `hann`.
        block_size: Side in pixels, such as 1024, of the overlapping blocks into which the single pass divides larger
            images. The features of blocks are blended (Hann weights), and memory does not grow with the image. Null
            processes images as a whole, which refine, upsampler and patch_fit: paper need.

    Raises:
        UserError: If a setting is out of range.
    """

    inference: Inference = "single"
    stride: int = 24
    window_batch: int | None = None
    templates: Templates = "openai_imagenet"
    patch_fit: PatchFit = "aligned"
    refine: Refinement | None = None
    upsampler: str = BILINEAR
    attention: Literal["full", "windowed"] | WindowedAttention = "full"
    blend: Blend = "mean"
    block_size: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} must be {' or '.join(allowed)}, but got {getattr(self, name)!r}.")
        if not isinstance(self.attention, WindowedAttention) and self.attention not in ("full", "windowed"):
            raise UserError(
                f"attention must be full, windowed or WindowedAttention(..), but got {self.attention!r}. In YAML, its "
                "settings are written as attention: {reach: 1}."
            )
        check_at_least(1, stride=self.stride, window_batch=self.window_batch, block_size=self.block_size)
        if self.refine is not None and not isinstance(self.refine, Refinement):
            raise UserError(f"refine must be a Refinement such as LPOSS(preset='spar'), but got {self.refine!r}.")
        if self.block_size is not None:
            whole = {"refine": None, "upsampler": BILINEAR, "patch_fit": "aligned"}
            for name, needed in whole.items():
                if getattr(self, name) != needed:
                    raise UserError(
                        f"block_size cannot be combined with {name}, which needs the whole image. Set {name} to "
                        f"{needed or 'null'}, or leave out block_size."
                    )
        prompt_templates(self.templates)
        if self.upsampler != BILINEAR:
            check_weights(self.upsampler)

    def check_blocks(self) -> None:
        """Raise UserError if block_size is set, but has no effect."""
        if self.block_size is not None and self.inference == "sliding":
            raise UserError(
                "block_size divides images for the single pass, but inference is sliding, which divides them into "
                "windows already. Set inference to single, or leave out block_size."
            )

    @property
    def windowed(self) -> WindowedAttention | None:
        """Settings of windowed attention; None for full attention."""
        if isinstance(self.attention, WindowedAttention):
            return self.attention
        return WindowedAttention() if self.attention == "windowed" else None

    def build_upsampler(self) -> AnyUp | None:
        """Return the image-guided upsampler on the CPU, or None for bilinear upsampling.

        Raises:
            WeightsError: If its weights cannot be read or downloaded.
        """
        return None if self.upsampler == BILINEAR else AnyUp(self.upsampler)


def check_names(given: dict[str, Any], where: str) -> None:
    """Raise UserError unless all keys of `given` are fields of `InferenceConfig`.

    Args:
        given: Settings by name.
        where: Source of the settings, named in the error message.
    """
    names = [field.name for field in fields(InferenceConfig)]
    for name in given:
        if name not in names:
            raise UserError(f"{where}: unknown setting {name!r}. {nearest(name, names)}Allowed: {', '.join(names)}.")
