"""Native kernels: C++ sources, and the Python door to them."""
