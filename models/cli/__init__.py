"""The command `jaxquant`."""
