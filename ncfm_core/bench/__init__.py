"""The command `python -m ncfm_core.bench`, also `ncfm bench`: how fast a step is, and how long it takes from data to accuracy.

It needs torch and this package, nothing of the service or the worker, so that it runs wherever a device is lent.
"""
