"""What to warm: TOML or JSON in, frozen dataclasses out, every problem at once with its line and near match.

Only `rewrite` (``import-tests --update``) and the generator of `schema` write files.
"""
