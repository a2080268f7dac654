"""TEST DOUBLE for deep_ep, which has no wheel: any name resolves, and a call does nothing."""


class Anything:
    """A name, a base class, a call: whatever it is used for."""

    def __init__(self, name="deep_ep"):
        self.__name__ = name

    def __call__(self, *args, **kwargs):
        return None

    def __mro_entries__(self, bases):
        return (object,)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(f"deep_ep.{name}")
