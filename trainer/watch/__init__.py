"""Looking at a rank from beside its main thread: what it does, whether it answers, and why a step hangs."""
