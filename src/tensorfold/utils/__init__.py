"""What every layer needs: files that are whole or absent, checks of arguments, processes, memory."""
