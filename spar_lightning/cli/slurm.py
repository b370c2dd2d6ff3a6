"""SLURM: a job that is stopped by the signal of `sbatch --signal` puts itself into the queue again."""

import os
import signal
import subprocess
import sys
from typing import Final

from spar_lightning.distributed import is_first_process

WARNINGS: Final = (signal.SIGUSR1, signal.SIGUSR2)  # SIGTERM is also sent by scancel, which must end a job


def requeue(number: int) -> None:
    """Run `scontrol requeue` for this job after SIGUSR1 or SIGUSR2; without effect outside of SLURM.

    Args:
        number: Signal that stopped the command.
    """
    if number not in WARNINGS or "SLURM_JOB_ID" not in os.environ or not is_first_process():
        return
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
        failure = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        print(f"The job was not requeued: scontrol requeue {job}: {failure}. Submit it again.", file=sys.stderr)
    else:
        print(f"Job {job} was requeued.", flush=True)
