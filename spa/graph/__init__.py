"""What a graph is: shapes, atoms, groups and their kinds, layers that sum channels, states; all read off it, nothing changed."""
