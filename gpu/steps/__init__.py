"""The steps of `run`: checks, measurements, their order, and the page that says how they went."""
