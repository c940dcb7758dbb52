"""Adapted models: the wrapper with its task classes, entry functions, status."""
