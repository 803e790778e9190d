"""`python -m minddpm` is `minddpm`."""

from minddpm.cli import main

main()
