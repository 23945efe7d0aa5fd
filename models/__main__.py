"""`python -m jaxquant_models` is the command `jaxquant`."""

from jaxquant_models.cli.entry import main

main()
