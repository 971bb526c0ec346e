"""Continuing token ids with a model."""
