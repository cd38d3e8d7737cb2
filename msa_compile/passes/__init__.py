"""Graph passes: one a file, in the order of ``pipeline.py``."""
