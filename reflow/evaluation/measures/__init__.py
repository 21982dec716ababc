"""Measures of sets of images, each a pure function of features [N, D] in fp64 on the CPU: no networks, no files."""
