"""Regrow's Hydra config groups; a package so that `pkg://regrow.conf` finds them when installed."""
