"""This machine and this process: deadlines, cancellation, GPUs by NVML and /proc, locks against other builders,
operator hooks, a command in the foreground.

Knows no engine and no manifest.
"""
