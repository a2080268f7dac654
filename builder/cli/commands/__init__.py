"""One module per verb: its arguments, what it runs, and what it reports."""
