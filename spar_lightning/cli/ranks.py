"""Ranks of a command that uses a Trainer: start, contact, and one end for all."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch import Trainer

from spar_lightning.cli.contact import contact
from spar_lightning.cli.processes import Processes
from spar_lightning.stopping import GRACE, Stopped, signals


def without_signal_handlers(trainer: Trainer) -> Trainer:
    """Return a Trainer that leaves signals to `stopping`.

    Lightning's handler of SIGTERM waits in a collective, and its handler of SIGUSR1 writes a checkpoint in the middle
    of a step.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


@contextmanager
def connected(args: Sequence[str], trainer: Trainer, timeout: float, fabric: Fabric | None = None) -> Iterator[None]:
    """Start the other processes of this machine if no launcher has, and keep contact with all ranks in the block.

    All processes end together, with one message, if one of them fails (see `cli.contact`).

    Args:
        args: Arguments of `spar`, of which the first one is the command.
        trainer: Trainer of the command.
        timeout: Seconds without a sign of life from another rank after which this process ends.
        fabric: Fabric that the command uses instead of the Trainer, not launched yet.
    """
    environment = getattr(trainer.strategy.launcher, "cluster_environment", None)
    if environment is None:  # one process, or a strategy such as ddp_spawn that forks Python itself
        yield
        return
    devices, nodes = trainer.num_devices, trainer.num_nodes
    environment.validate_settings(num_devices=devices, num_nodes=nodes)
    processes = None
    if not environment.creates_processes_externally:
        processes = Processes(args, devices, nodes)
        signals.checks.append(processes.check)
    try:
        joined: Any = fabric or trainer
        (fabric.launch if fabric else trainer.strategy.setup_environment)()
        where = args[0], joined.global_rank, joined.world_size, environment.main_address
        with contact(*where, joined.strategy.broadcast, timeout):
            yield
        if processes:
            processes.wait()
    except Stopped:
        if processes:
            processes.wait(GRACE)
        raise
    finally:
        if processes:
            signals.checks.remove(processes.check)
            processes.close()
