"""Time and memory of whole models, dense against sparse: ``python -m msa_compile.bench MODEL --lengths 8192,32768``."""
