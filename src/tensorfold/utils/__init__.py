"""Tools for every folder: files that are whole or absent, checks of arguments, processes, memory."""
