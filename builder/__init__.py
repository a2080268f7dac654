"""Containerised warm-up of sglang's JIT caches: see README.md for what it does, run.py for the story of a run."""

__version__ = "0.1.0"
