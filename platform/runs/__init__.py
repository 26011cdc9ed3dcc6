"""One run from its spec to its record: train, evaluate, export, record; the file that wraps it for Ray Train."""
