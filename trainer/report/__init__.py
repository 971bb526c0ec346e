"""Reports: what runs left in their directories, as one self-contained page."""
