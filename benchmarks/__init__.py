"""How fast, against what people write by hand. Run from the checkout: `make bench`."""
