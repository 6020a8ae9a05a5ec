"""Recipes, the settings of the commands, and the recipes that come with the package."""
