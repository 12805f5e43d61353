"""The steps of `run`: checks, measurements, their order, and the summary page."""
