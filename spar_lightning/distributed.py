"""Rank and world size from environment variables, available before Lightning or torch are initialized.

torchrun sets RANK and LOCAL_RANK; srun sets SLURM_PROCID and SLURM_LOCALID. Lightning and `spar cache` set
LOCAL_RANK and NODE_RANK for the processes that they start.
"""

import os


def is_first_process() -> bool:
    """Return whether this process is rank 0 of all nodes, or the only process."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def local_rank() -> int | None:
    """Return the rank of this process on its machine, or None if a launcher did not start several processes."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in os.environ and world_size() > 1:
            return int(os.environ[name])
    return None


def world_size() -> int:
    """Return the number of processes on all nodes."""
    # In a batch script without srun, SLURM_NTASKS is the number of allowed tasks, but only one process runs.
    tasks = os.environ.get("SLURM_NTASKS") if "SLURM_STEP_ID" in os.environ else None
    return int(os.environ.get("WORLD_SIZE") or tasks or 1)
