"""Models, finished or in training: find them, load them, write text with them, export them."""
