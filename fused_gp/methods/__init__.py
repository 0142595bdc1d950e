"""The ways in which the penalty's gradient reaches the weights, one file each; `choice` decides between them."""
