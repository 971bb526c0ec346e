"""Jumps of the loss, written down: `config`, `spikes`."""
