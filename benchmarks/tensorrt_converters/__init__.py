"""The table of what torch-tensorrt converts, read off its sources."""
