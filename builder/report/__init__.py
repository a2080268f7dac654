"""What people and machines get to read: results, tables, live lines, GitHub, metrics, webhook.

Pure data in; the console is the only writer to a stream. Decides nothing.
"""
