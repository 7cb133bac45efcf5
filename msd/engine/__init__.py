"""DO: engines that generate, and the pool that keeps them."""
