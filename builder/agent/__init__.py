"""The in-container program, ``python3 -m builder.agent``: reads one job, compiles, proves, writes the marker last.

Reports in events on stdout. Standard library only, Python 3.10. Knows no engine and no manifest.
"""
