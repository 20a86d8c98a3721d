"""What the programs at the top of the repository do: flags, one-line errors, exit statuses."""
