"""Features of a split in a file, for an analysis of one's own."""

import numpy as np
import torch

from moco import distributed, files
from moco.distributed import DistContext
from moco.errors import RunError
from moco.listing import ImageFolder


def gather_in_order(rows: torch.Tensor, total: int, ctx: DistContext) -> torch.Tensor:
    """The rows (total, d) of all ranks on the CPU, in the order of the data set, from each rank's share of them.

    rows: (n, d), on any device, as `loader.eval_loader` distributes the images. All ranks must call this.
    """
    whole = torch.zeros(total, rows.shape[1], device=ctx.device)
    whole[ctx.rank :: ctx.world_size] = rows.to(ctx.device)
    return distributed.all_reduce(whole).cpu()


def save(path: str, features: torch.Tensor, folder: ImageFolder, split: str) -> None:
    """Write the features (N, d) of the folder's images, in its order, with labels, paths and classes, for numpy.load.

    Raises RunError if the file cannot be written.
    """
    arrays = {
        "features": features.numpy(),
        "labels": np.array(folder.labels, dtype=np.int64),
        "paths": np.array(list(folder.paths)),
        "classes": np.array(folder.classes),
        "split": np.array(split),
    }
    try:
        with files.atomic_write(path, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise RunError(f"{path} could not be written ({error}); free some space") from error
