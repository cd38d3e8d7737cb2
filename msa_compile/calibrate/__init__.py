"""Training of the index branch: the loss that aligns its scores with what attention looks at."""
