"""What files from outside must hold, and how they are read: strictly, errors in one line."""
