"""`python -m qwencli`."""

from qwencli.cli import main

main()
