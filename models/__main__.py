"""`python -m models` is the command `jaxquant`."""

from models.entry import main

main()
