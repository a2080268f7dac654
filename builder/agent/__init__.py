"""The in-container program: standard library only, Python 3.10 and later, ``python3 -m builder.agent``.

The host side imports it too, so that markers and inventories are read by the code that wrote them.
"""
