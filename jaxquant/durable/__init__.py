"""Files that survive a kill: claimed directories, atomic publication, the store of a long run."""
