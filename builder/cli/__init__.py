"""argv, environment and signals in, one exit status out. `commands` has one module per verb: options → run → report.

The only reader of os.environ and the only caller of print.
"""
