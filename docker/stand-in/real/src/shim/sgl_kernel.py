"""TEST DOUBLE for sgl_kernel, which has no wheel that imports without a GPU: names resolve, calls raise."""

__version__ = "0.4.10"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel stand-in: {name}")

    missing.__name__ = name
    return missing
