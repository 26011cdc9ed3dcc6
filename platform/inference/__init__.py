"""Finished models: load them, write text with them, export them."""
