"""`python -m app.cli`: the command, where it is not known what it is called or where it lies."""

from app.cli import main

main()
