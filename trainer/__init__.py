"""The training loop and what surrounds it: hooks, data, optimizer, schedules, parallelism.

Imports `models` and `checkpoint`; knows nothing of Hydra.
"""
