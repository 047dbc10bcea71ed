"""The Triton kernels. A file of this package imports Triton; `fused_triton` imports it, late."""
