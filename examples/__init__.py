"""Small programs that show `msa_compile` at work; each runs as `python -m examples.NAME`."""
