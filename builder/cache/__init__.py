"""The cache root on disk: families and their keys, entries, markers, layout, generations, what may be removed.

Reads never block, follow no link and never raise for what they find; writes are one rename. Standard library only: used
on the host and in the container.
"""
