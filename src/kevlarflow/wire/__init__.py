"""What the processes of a cluster say to one another, and the channels that carry it."""
