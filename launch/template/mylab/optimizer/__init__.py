"""Lion: `config`, `lion`."""
