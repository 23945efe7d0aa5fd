"""Recipes, which map weights to methods, and their JSON form."""

from jaxquant.recipes.recipe import Plan, resolve
from jaxquant.recipes.serialize import register
from jaxquant.recipes.size import Size

__all__ = ["Plan", "Size", "register", "resolve"]
