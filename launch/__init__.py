"""From a command to running ranks: Hydra, preflight, local ranks, and the commands. The only package that
imports Hydra.
"""
