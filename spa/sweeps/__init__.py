"""Many prunings of one model, side by side: points, their folder, and the front."""
