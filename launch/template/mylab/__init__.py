"""Models, hooks and optimizers of our own, for Regrow."""
