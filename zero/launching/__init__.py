"""Several processes of one run: how they are started, who they are, what they print, and how they end."""
