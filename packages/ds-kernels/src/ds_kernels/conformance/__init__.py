"""Does every implementation of every op do what its reference does? `ds-kernels check`, and the tests."""
