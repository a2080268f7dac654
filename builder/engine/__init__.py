"""The one border to Docker's API (docker-py, Podman's differences), and one container's life under it: create, attach,
drain, stop, remove.

Raises EngineLostError and its subclasses for whatever the engine does. Knows no cache layout.
"""
