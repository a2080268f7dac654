"""The one border to Docker's API (docker-py, Podman's differences), and one container's life under it: create, attach,
drain, stop, remove.

Raises EngineLostError and EngineRefusedError only. Knows no task and no cache layout.
"""
