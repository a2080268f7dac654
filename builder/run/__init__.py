"""The story of a run: plan, schedule, dispatch, execute, judge, tidy. `warm` has it on one screen.

The only package that sees both the engine and the cache.
"""
