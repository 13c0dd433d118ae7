"""Reference detectors built on focalops, and the commands that train, evaluate and run them."""
