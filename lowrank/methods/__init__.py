"""What is kept of a layer's input, one frozen dataclass a method."""
