"""`python -m htm_pytorch` is `htm`, for launchers of several processes."""

from htm_pytorch.cli import main

main()
