"""CT files read into Hounsfield units in one standard orientation, and cut into network inputs."""
