"""The documents of the repository as programs read them: pages, commands, generated tables."""
