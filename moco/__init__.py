"""Contrastive learning with non-semantic negatives (Ge et al., NeurIPS 2021).

MoCo, contrastive_logits and patch_negatives are imported on first use, so that `import moco.errors` needs no PyTorch.
"""

import importlib

__version__ = "0"  # pyproject.toml reads it here, without importing
_MODULES = {"MoCo": "builder", "contrastive_logits": "builder", "patch_negatives": "negatives"}
__all__ = ["MoCo", "contrastive_logits", "patch_negatives"]


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f"moco.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
