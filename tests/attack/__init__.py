"""Hostile and damaged input, seeded: what is read never runs code, never hangs, never eats memory."""
