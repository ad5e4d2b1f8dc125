"""Measurements. Ratios only between things timed side by side in one run, interleaved, after a warm-up."""
