"""TEST DOUBLE for sgl_kernel, which has no wheel that imports without a GPU: names resolve, calls raise.

On a GPU that the program under test simulates, a call does nothing, as the real one's launch would. Its submodules
resolve as well, with names that do nothing.
"""

import importlib.machinery
import os
import sys
import types

__version__ = "0.4.10"
__path__ = []  # so that it counts as a package, whose submodules the finder below makes


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        if os.environ.get("WARM_CACHE_PRETEND"):
            return
        raise NotImplementedError(f"sgl_kernel stand-in: {name}")

    missing.__name__ = name
    return missing


class Submodules:
    """Makes any submodule of this one."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        from deep_ep import Anything

        def resolve(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything(f"{module.__name__}.{name}")

        module.__getattr__ = resolve


sys.meta_path.append(Submodules())
