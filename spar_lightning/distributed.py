"""Which of a run's processes this one is, told by the launcher before Lightning or torch have started.

torchrun sets RANK and LOCAL_RANK, srun SLURM_PROCID and SLURM_LOCALID, Lightning and `spar cache` for
the processes that they start themselves LOCAL_RANK and NODE_RANK.
"""

import os


def is_first_process() -> bool:
    """Whether this process is the only one or the first of all nodes."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def local_rank() -> int | None:
    """Number of this process on its machine; None where no launcher started it beside others."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in os.environ and world_size() > 1:
            return int(os.environ[name])
    return None


def world_size() -> int:
    """Number of processes on all nodes."""
    # Of a batch script that srun did not start, SLURM says how many tasks there could be; it is one process.
    tasks = os.environ.get("SLURM_NTASKS") if "SLURM_STEP_ID" in os.environ else None
    return int(os.environ.get("WORLD_SIZE") or tasks or 1)
