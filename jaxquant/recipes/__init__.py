"""Recipes, which map weights to methods, and their JSON form."""
