"""Interpolation and the norm penalty as autograd Functions of any order, and the backends that compute them."""
