"""The stages of `jaxquant analyze`; each keeps its result, so that a killed run continues."""
