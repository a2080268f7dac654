"""What to warm: TOML or JSON in, frozen dataclasses out, every problem at once with its line and near match.

Reads files, nothing else.
"""
