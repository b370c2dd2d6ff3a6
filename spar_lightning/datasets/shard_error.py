"""Error of the shards and folders that contain the training images."""

from spar_lightning.errors import UserError


class ShardError(UserError):
    """Error for a shard or image folder that is missing, empty, damaged, changed, or of an unsupported kind."""
