"""Measuring what a model can do: tasks as data, and the same numbers wherever they are computed."""
