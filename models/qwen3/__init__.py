"""The Qwen3 family, dense and with experts: `config`, `model`, `plan`."""
