"""What a training run needs on machines that are not here."""
