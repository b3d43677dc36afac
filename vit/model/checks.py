"""Arguments of a VisionTransformer that can't be, alone or beside others."""

# How the tokens become the head's input, see VisionTransformer.pool
POOLINGS = ("cls", "mean", "cls_mean", "map")


def check_counts(num_layers: int, num_channels: int, num_classes: int) -> None:
    """Raise ValueError unless all of them are positive."""
    counts = (num_layers, num_channels, num_classes)
    if min(counts) <= 0:
        raise ValueError(f"num_layers, num_channels, num_classes must be positive, got {counts}")


def check_pooling(global_pool: str, cls_token: bool, distill_token: bool, fc_norm: bool) -> None:
    """Raise ValueError for a pooling that is unknown, or that the other arguments rule out."""
    if global_pool not in POOLINGS or (global_pool in ("cls", "cls_mean") and not cls_token):
        raise ValueError(
            f"global_pool must be cls or cls_mean (with cls_token), mean or map, got {global_pool}"
        )
    if distill_token and global_pool != "cls":
        raise ValueError(f"distill_token needs global_pool=cls, got {global_pool}")
    if fc_norm and global_pool != "mean":
        raise ValueError(f"fc_norm needs global_pool=mean, got {global_pool}")
