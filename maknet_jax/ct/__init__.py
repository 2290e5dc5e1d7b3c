"""CT files read as Hounsfield units in one standard orientation and cut into network inputs."""
