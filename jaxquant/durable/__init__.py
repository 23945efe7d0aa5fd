"""Files that survive kills: claimed folders, atomic publication, the store of a long run."""
