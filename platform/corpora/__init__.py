"""Corpora: from any source to rows on disk, and from there to the trainers in a fixed order."""
