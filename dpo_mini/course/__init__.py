"""What the notebooks and the command line draw with; the library never imports it."""
