"""`headrace bench`: measures a group from outside, through its API and its traces."""
