"""What removed channels did is taken over by those that stay, in closed form."""
