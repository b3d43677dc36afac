"""TODO: say what this file is for."""

import errno

from vit.config.config import Config
from vit.text import first_line

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def describe_fault(error: OSError | RuntimeError, config: Config) -> str | None:
    """What to tell a user of a full disk, too little memory or a lost process; None for anything else, which is a bug."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"the disk takes no more ({error.strerror or error}); make room"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported yet
        smaller = max(1, (config.train.micro_batch_size or config.train.batch_size) // 2)
        return (
            f"out of memory: try train.micro_batch_size={smaller}, which leaves the result as it is "
            f"({first_line(error)})"
        )
    if "gloo/transport" in str(error) or type(error).__name__.startswith("Dist"):
        return f"another process of this run has ended ({first_line(error)})"
    if str(error).startswith("DataLoader worker"):
        return f"a process that decodes pictures died ({first_line(error)}); if memory is short, lower runtime.workers"
    return None
