"""Where checkpoints lie: local folders, object stores, and whatever fsspec opens."""
