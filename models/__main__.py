"""Makes `python -m jaxquant_models` run the command `jaxquant`."""

from jaxquant_models.cli.entry import main

main()
