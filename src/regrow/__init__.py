"""A research training framework for language models whose runs grow back after any kill."""
