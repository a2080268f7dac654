"""What other machines run: objects for ``kubectl apply -f -``, scripts for ``sbatch``, and a sum of their reports.

Values in, text out. Knows no engine and no client of a scheduler, and starts nothing.
"""
