"""Containerised warm-up of sglang's JIT caches: README.md has what it does, docs/architecture.md how it is built."""

__version__ = "0.1.0"
