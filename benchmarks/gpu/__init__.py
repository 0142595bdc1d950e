"""`make gpu`: everything that one wants to know of a device, in the few minutes in which it is at hand."""
