"""Llama with GEGLU: `config`, `model`, `plan`, `hf`."""
