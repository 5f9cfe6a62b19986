"""What the two MiniGrid trainings share."""
