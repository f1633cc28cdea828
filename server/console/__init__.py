"""The console of a coordinator: its sites, its runs, its round log, and what an operator does about them."""
