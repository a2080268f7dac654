"""argv, environment and signals in, one exit status out. `commands` has one module per verb: options → run → report.

Reads the environment for all host code but the connection to the engine. The only caller of print on the host.
"""
