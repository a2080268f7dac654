"""Importing the fake torch is a mistake of whoever does it: the real one takes seconds."""

__version__ = "2.14.1+tiny"
