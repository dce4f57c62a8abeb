"""With PRETEND_DEVICE=1, a Python process has a pretended CUDA device as soon as it imports torch."""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

if os.environ.get("PRETEND_DEVICE"):

    class _AfterTorch(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name != "torch":
                return None
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is None:
                return None
            run = spec.loader.exec_module

            def then(module):
                run(module)
                sys.path.append(str(Path(__file__).parents[1]))
                import pretend_device

                pretend_device.present_from_now_on(bool(os.environ.get("PRETEND_NO_DOUBLE")))

            spec.loader.exec_module = then
            return spec

    sys.meta_path.insert(0, _AfterTorch())
