"""`python -m app.cli`: the command `neuronlens`."""

from app.cli import main

main()
