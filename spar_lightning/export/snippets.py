"""Python code shared by the READMEs of several recipes. `{trunk}` stands for the timm VisionTransformer in `model`.

The positional embedding is resized as in training: bicubic, align_corners=False, without antialiasing.
"""

from typing import Final

ANTIALIASED: Final = (
    "By default, {library} accepts only the native image size. With {option}, it resizes the positional embedding with "
    "antialiasing, which changes the features. The functions below resize it as in training, without antialiasing."
)

TIMM_TOKENS: Final = """
import torch.nn.functional as F


def tokens(model, images):
    trunk = {trunk}
    patches = trunk.patch_embed.proj(images)
    table = trunk.pos_embed.transpose(1, 2).unflatten(2, trunk.patch_embed.grid_size)
    table = F.interpolate(table, patches.shape[2:], mode="bicubic", align_corners=False)  # without antialiasing
    return trunk.norm(trunk.blocks((patches + table).flatten(2).transpose(1, 2)))
"""

# Appended to TIMM_TOKENS: the value path of SigLIP's attention pooling.
TIMM_POOL: Final = """

def dense(model, images):
    pool, patch = {trunk}.attn_pool, {trunk}.patch_embed.patch_size[0]
    weight, bias = pool.kv.weight.chunk(2)[1], pool.kv.bias.chunk(2)[1]  # value projection of the attention pooling
    values = pool.proj(F.linear(tokens(model, images), weight, bias))
    h, w = (side // patch for side in images.shape[2:])
    return (values + pool.mlp(pool.norm(values))).unflatten(1, (h, w))
"""

# The same pooling with the parameter names of transformers.
TRANSFORMERS_POOL: Final = """

def dense(model, images):
    head = model.head
    weight, bias = head.attention.in_proj_weight.chunk(3)[2], head.attention.in_proj_bias.chunk(3)[2]
    values = head.attention.out_proj(F.linear(tokens(model, images), weight, bias))
    h, w = (side // model.config.patch_size for side in images.shape[2:])
    return (values + head.mlp(head.layernorm(values))).unflatten(1, (h, w))
"""
