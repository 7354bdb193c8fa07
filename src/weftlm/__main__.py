"""`python -m weftlm`: the command line."""

from weftlm.cli.main import main

main()
