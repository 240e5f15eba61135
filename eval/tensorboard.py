"""TensorBoard's files beside metrics.jsonl, where tensorboard is installed: tensorboard --logdir RUN_DIR."""

from pathlib import Path

WRITERS = {}  # directory of a stage -> its writer


def add(out: Path, line: dict) -> None:
    """The metrics of one step. A stage that goes on after a stop voids what was written of the steps that it repeats."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    if out not in WRITERS:
        WRITERS[out] = SummaryWriter(str(out / "tensorboard"), purge_step=line["step"])
    for name, value in line.items():
        WRITERS[out].add_scalar(name, value, line["step"])
    WRITERS[out].flush()  # a process of several leaves without closing files
