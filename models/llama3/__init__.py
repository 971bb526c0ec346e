"""The Llama 3 family: `config`, `model`, `plan`."""
