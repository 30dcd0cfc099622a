"""What data and weights say of channels: moments, rows, gradients, sums."""
