"""Python runs this at the start of every process on fake GPUs, and of the processes that those start."""

import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


class AfterTorch:
    """Finds torch as usual, and adds to it once it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                fakegpu_report.watch(module)
                import fakegpu_values

                fakegpu_values.install()

            spec.loader.exec_module = exec_module
        return spec


if "libcudart" in os.environ.get("LD_PRELOAD", ""):
    import fakegpu_report

    if fakegpu_report.install():
        sys.meta_path.insert(0, AfterTorch())

# This file hides another of its name, which a distribution or a virtual environment may have.
spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != HERE])
if spec and spec.loader:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
