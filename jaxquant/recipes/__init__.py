"""Which method for which weight, and how both are written as JSON."""
