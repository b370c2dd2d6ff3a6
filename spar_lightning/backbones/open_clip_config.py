"""Settings of open_clip models that their weights do not contain: architecture, normalization, and activation.

A pretrained tag brings its own settings. Weights from a path have them in `open_clip_config.json`, in the same folder,
as in repositories on the Hugging Face Hub and in exports of `spar export --to open_clip`. Without that file, the
settings of the model are used, and a warning names the tags of the model that differ.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from spar_lightning.backbones.weights import WeightsError, skipped
from spar_lightning.errors import UserError, nearest

CONFIG: Final = "open_clip_config.json"
ARCHITECTURE: Final = ("layers", "width", "patch_size", "image_size", "timm_model_name")  # keys of vision_cfg
log = logging.getLogger("spar_lightning")


def model_config(model: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model.

    Raises:
        UserError: open_clip does not have this model.
    """
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        names = open_clip.list_models()
        raise UserError(
            f"open_clip has no model {model!r}. {nearest(model, names)}open_clip.list_models() lists all {len(names)}."
        )
    return config


def pretrained_config(model: str, pretrained: str | None) -> dict[str, Any]:
    """Return open_clip's configuration of a pretrained tag; empty for a path or None."""
    import open_clip

    return dict(open_clip.get_pretrained_cfg(model, pretrained)) if pretrained else {}


def settings(model: str, pretrained: str | None) -> dict[str, Any]:
    """Return `mean`, `std` and `quick_gelu` of pretrained weights, as far as the tag or the folder defines them.

    Raises:
        WeightsError: The folder of the weights has a configuration that is invalid or describes another model.
    """
    if pretrained is None:
        return {}
    return pretrained_config(model, pretrained) or _recorded(model, pretrained)


def quick_gelu(model: str, pretrained: str | None) -> bool:
    """Return whether the weights were trained with QuickGELU, according to the model, the tag or the folder."""
    return bool(model_config(model).get("quick_gelu") or settings(model, pretrained).get("quick_gelu"))


def warn_if_assumed(model: str, pretrained: str | None, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Log a warning if the settings of weights from a path are not known, and tags of the model differ in them.

    Args:
        model: Name of the model in open_clip.
        pretrained: Pretrained tag or path of the weights.
        mean: Mean that is used.
        std: Standard deviation that is used.
    """
    import open_clip

    if pretrained is None or pretrained_config(model, pretrained) or _file(pretrained).is_file():
        return
    used = {"mean": tuple(mean), "std": tuple(std), "quick_gelu": quick_gelu(model, pretrained)}
    others = {tag: differing(model, tag, used) for tag in open_clip.list_pretrained_tags_by_model(model)}
    tags = [tag for tag, keys in others.items() if keys]
    missing = skipped() and not Path(pretrained).exists()
    if not tags and not missing:
        return
    state = "does not exist" if missing else f"has no {CONFIG} next to it"
    activation = "QuickGELU" if used["quick_gelu"] else "GELU"
    differ = f", but the weights of {', '.join(tags)} were trained with others" if tags else ""
    quick = f", or model to {model}-quickgelu" if any("quick_gelu" in keys for keys in others.values()) else ""
    log.warning(
        f"pretrained: {pretrained} {state}. {model} uses {activation} and mean {used['mean']}{differ}. For weights "
        f"that need others, set pretrained to a folder with the weights and their {CONFIG}{quick}."
    )


def differing(model: str, tag: str, used: Mapping[str, Any]) -> list[str]:
    """Return the settings in `used` for which a pretrained tag has another value."""
    known = {**pretrained_config(model, tag), "quick_gelu": quick_gelu(model, tag)}
    return [key for key, value in used.items() if known.get(key, value) != value]


def _file(pretrained: str) -> Path:
    path = Path(pretrained)
    return (path if path.is_dir() else path.parent) / CONFIG


def _recorded(model: str, pretrained: str) -> dict[str, Any]:
    """Return the settings in the configuration next to the weights; an empty mapping without such a file."""
    file = _file(pretrained)
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        theirs, preprocess = content["model_cfg"], content.get("preprocess_cfg", {})
        vision = {"embed_dim": theirs["embed_dim"], **theirs["vision_cfg"]}
        found = {key: tuple(map(float, preprocess[key])) for key in ("mean", "std") if key in preprocess}
        if any(len(values) != 3 for values in found.values()):
            raise ValueError("mean and std must have three values")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{file} is not a configuration of open_clip ({type(error).__name__}: {error}). Copy it again from the "
            "repository of the weights."
        ) from error
    config = model_config(model)
    ours = {"embed_dim": config["embed_dim"], **config["vision_cfg"]}
    for key in ("embed_dim", *ARCHITECTURE):
        if key in vision and key in ours and vision[key] != ours[key]:
            raise WeightsError(
                f"{file} does not describe {model}: {key} is {vision[key]!r} there, but {ours[key]!r} in {model}. "
                "Set model to the model of these weights."
            )
    return {**found, "quick_gelu": bool(theirs.get("quick_gelu"))}
