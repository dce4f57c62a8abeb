"""Many measured points: sessions, sweeps, sensitivity, allocation, and the store that keeps them."""
