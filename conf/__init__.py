"""Regrow's Hydra config groups; a package so that `pkg://conf` finds them when installed."""
