"""Inlay."""
