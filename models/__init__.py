"""Language models as plain single-device modules, with their configs and initialisation.

Nothing here knows about meshes, ranks, checkpoints or Hydra.
"""
