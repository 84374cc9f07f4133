"""Plans training runs for machines that are not here."""
