"""Ground floor: arrays and static integers in, arrays out. Imports nothing of jaxquant."""
