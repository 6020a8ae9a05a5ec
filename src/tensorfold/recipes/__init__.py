"""Recipes: what is folded how, with the settings of every command; shipped ones beside."""
