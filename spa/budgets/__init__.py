"""From a limit to widths: costs, losses, and the search between them."""
