"""TensorBoard's files beside metrics.jsonl, where tensorboard is installed: tensorboard --logdir RUN_DIR."""
from functools import cache
from pathlib import Path


@cache
def writer(out: Path):
    """A writer into out/tensorboard, or None where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))


def add(out: Path, line: dict) -> None:
    """The metrics of one step; a step that is trained again after a stop is written again."""
    if file := writer(out):
        for name, value in line.items():
            file.add_scalar(name, value, line["step"])
        file.flush()  # a process of several leaves without closing files
