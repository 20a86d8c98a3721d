"""Resolvent of a tridiagonal non-Hermitian Hamiltonian, by continued fractions."""
