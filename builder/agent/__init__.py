"""The in-container program, ``python3 -m builder.agent``: reads one job, compiles, proves, writes the marker last.

Standard library only, Python 3.10 and later. It knows no engine and no manifest; the host starts it and does not import
it.
"""
